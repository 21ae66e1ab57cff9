"""The fused paths, one file each; `polyce.registry` lists them."""
