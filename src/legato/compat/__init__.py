"""The only package that may reach into Keras's private modules.

What is used here has no public name; each use says why it is needed.
"""
