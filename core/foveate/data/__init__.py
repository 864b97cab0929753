"""From rows to packed batches: data sets, templates, tokenizers, pictures, samples, steps."""
