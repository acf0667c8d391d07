"""Reading and writing model folders: lazy safetensors in, atomic shards out, and the AWQ format between them."""
