"""The emoji of four vendors that npm carries as `emoji-datasource-<vendor>`: which packages, whose pictures, one table of names.

Pictures are `img/<vendor>/64/<image>` and the table is `emoji.json` in every package, the same bytes in all. They are downloaded when
a data set is made (`core.npm`) and are never part of this repository.
"""

VERSION = "16.0.0"
SIZE = 64
SHA256 = {  # of the archives as published
    "apple": "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075",
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "facebook": "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
}
RIGHTS = {
    "apple": "(c) Apple, no commercial use",
    "google": "Noto Emoji, Apache-2.0",
    "twitter": "Twemoji, CC BY 4.0",
    "facebook": "(c) Facebook, unclear",
}


def package(vendor: str) -> str:
    """Name of a vendor's npm package."""
    return f"emoji-datasource-{vendor}"
