"""Core's own teachers: raw patches, features of encoders, latents of autoencoders.

The first entry of every record holds one row a visual token, `[N, width]`, row by row of the grid; `width` is what
`describe` says, and `decode`, where there is one, reads such rows.
"""
