"""From a call of Diffusers to a call of anyattn."""
