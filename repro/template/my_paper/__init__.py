"""my_paper: authors, title, venue and year. Attention pooling stands here until the paper's own method does."""

__plugin__ = "my_paper"
__interface__ = 1
