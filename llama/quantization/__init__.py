"""The int8 and int4 weight formats, and quantization into them."""
