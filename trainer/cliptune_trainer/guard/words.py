"""Everyday words, by which a model is asked what it still knows where no general data is at hand.

Enters: nothing. Leaves: texts. Called by `agreement`. The words are plain nouns of things that are pictured
everywhere, a few of each kind, none of a profession's own: what a fine-tuned model should not have lost.
"""

from __future__ import annotations

from typing import Final

_KINDS: Final = (
    "a dog, a cat, a horse, a cow, a bird, an eagle, a fish, a shark, a snake, a frog, an elephant, a lion",
    "a butterfly, a bee, a spider, a mouse, a rabbit, a bear, a duck, a penguin, a turtle, a monkey",
    "an apple, a banana, an orange, a tomato, a carrot, a slice of bread, a pizza, a cake, a cup of coffee",
    "a glass of wine, an egg, a bowl of soup, cheese, an ice cream, a sandwich, grapes, a pumpkin",
    "a car, a truck, a bus, a bicycle, a motorcycle, a train, an airplane, a helicopter, a ship, a boat",
    "a rocket, a traffic light, a road, a bridge, a wheel, a stop sign, a railway station",
    "a house, a castle, a church, a skyscraper, a tent, a door, a window, a staircase, a street at night",
    "a chair, a table, a bed, a lamp, a sofa, a mirror, a clock, a vase, a bookshelf, a carpet, a bathtub",
    "a computer, a keyboard, a telephone, a television, a camera, a printer, a light bulb, a battery",
    "a hammer, a knife, scissors, a key, a screwdriver, a ladder, a rope, a bucket, an umbrella, a broom",
    "a book, a newspaper, a pencil, a letter, a map, a calendar, a flag, a coin, a box, a gift",
    "a shirt, a shoe, a hat, a pair of glasses, a watch, a dress, a backpack, a ring, a crown",
    "a guitar, a piano, a violin, a drum, a trumpet, a microphone, sheet music",
    "a ball, a kite, a doll, a chess board, a trophy, a balloon, playing cards, a swing",
    "a tree, a flower, a rose, grass, a forest, a mushroom, a leaf, a cactus, a wheat field",
    "the sun, the moon, a star, a cloud, rain, snow, lightning, a rainbow, fire, smoke",
    "a mountain, a beach, the sea, a river, a waterfall, a desert, an island, a cave, the night sky",
    "a man, a woman, a child, a baby, a crowd, a hand, an eye, a face, a smiling face, a skeleton",
    "a doctor, a police officer, a cook, a farmer, a king, a dancer, a football player, a soldier",
    "a circle, a square, a triangle, an arrow, a heart, a spiral, stripes, a checkerboard, a grid of dots",
    "the letter A, the number 5, a question mark, a check mark, a logo, handwriting, a barcode, a chart",
    "something red, something green, something blue, something yellow, something black, something white",
    "one object, two objects, many small objects, an empty background, a close-up, a view from above",
    "a photograph, a drawing, a cartoon, an oil painting, an icon, a grey picture, a blurry picture",
)
_TEMPLATES: Final = ("{}", "a picture of {}")


def everyday_texts() -> tuple[tuple[str, ...], ...]:
    """Each thing in several wordings, which are averaged as a class's prompts are."""
    things = [thing.strip() for kind in _KINDS for thing in kind.split(",")]
    return tuple(tuple(template.format(thing) for template in _TEMPLATES) for thing in things)
