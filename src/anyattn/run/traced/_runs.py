"""The `run` function of each backend in use, as attributes of this module.

torch.compile can guard on a module's attribute, and not on a function inside the opaque chooser's answer.
"""
