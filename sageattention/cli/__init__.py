"""The command line: `python -m sageattention doctor | check | bench`. Nothing here is imported by the attention itself."""
