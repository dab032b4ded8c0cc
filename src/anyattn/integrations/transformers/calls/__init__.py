"""From a call of Transformers to a call of anyattn."""
