"""The command line: `python -m sageattention doctor | check | bench | explain | report`.

Nothing here is imported by the attention itself.
"""
