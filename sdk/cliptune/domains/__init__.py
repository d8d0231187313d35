"""Domain recipes: what holds for images of a kind where a job's spec is silent.

In: a domain's name, or a `JobSpec`. Out: the recipe, or the spec as it will run, with where each field comes
from: `defaults.toml`, then the recipe, then the spec itself, the later over the earlier. Called by
`cliptune domains`, offline, and by the trainer before it reads a job's spec, so that both say the same.
"""

from cliptune.domains.layers import Layered, layered
from cliptune.domains.recipe import DomainRecipe, chosen_later, load_recipe, recipe
from cliptune.spec_shape import DOMAINS as NAMES

__all__ = ["NAMES", "DomainRecipe", "Layered", "chosen_later", "layered", "load_recipe", "recipe"]
