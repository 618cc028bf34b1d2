"""ComfyUI nodes: `patch` is what they do, `v1` and `v3` how each generation of ComfyUI's API sees them.

`adapter` translates ComfyUI's attention call into ours, `slot` is the place in a model where such an override lives, and
`record` counts what ran. Only `v3` imports ComfyUI.
"""
