"""From a block's weights and the statistics of its inputs to 4-bit codes.

Read in this order: `rounding` (the grid), `scales`, `clip`, `fold`, `block` (one block), `engine` (all of them), and
`proof`, which checks a plugin's scale groups before any of it starts.
"""
