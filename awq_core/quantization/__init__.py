"""From a block's weights and the statistics of its inputs to 4-bit codes.

Read in this order: `rounding` (the grid), `scales`, `fold`, `clip`, `codes` (a linear), `block` (one block), `engine`
(all of them), and `proof`, which checks a plugin's scale groups before any of it starts. `heuristic`, `greedy` and
`gptq` choose codes in other ways than to the nearest; `rounded` says what they have in common.
"""
