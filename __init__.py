"""ComfyUI's entry to the pack: the list of its nodes, and the folder with their help pages."""

from .nodes import functions

try:
    from comfy_api.latest import ComfyExtension
except ImportError:  # cores before 0.3.48 know only classes with INPUT_TYPES
    from .nodes import v1

    NODE_CLASS_MAPPINGS = {node.NODE_ID: node for node in v1.NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.NODE_ID: node.DISPLAY_NAME for node in v1.NODES}
else:
    from .nodes import v3

    class SageAttentionExtension(ComfyExtension):
        """The pack as ComfyUI sees it."""

        async def get_node_list(self) -> list[type]:
            return [*v3.NODES]

    def comfy_entrypoint() -> SageAttentionExtension:
        """Called by ComfyUI once it has imported the pack."""
        return SageAttentionExtension()


WEB_DIRECTORY = "./web"
functions.register()
