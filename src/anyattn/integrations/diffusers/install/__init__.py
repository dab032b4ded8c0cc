"""How Diffusers is made to call anyattn, and how that is undone."""
