"""Class names of NYUDepthv2 (40) and SUN RGB-D (37), in the order of their label numbers, as the release spells them."""

NYU40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "blinds",
    "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books", "refridgerator",
    "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)  # fmt: skip

_SUN_SPELLING = {
    "floor mat": "floor_mat", "refridgerator": "fridge", "television": "tv", "shower curtain": "shower_curtain", "night stand": "night_stand",
}  # fmt: skip
SUN37 = tuple(_SUN_SPELLING.get(name, name) for name in NYU40[:37])
