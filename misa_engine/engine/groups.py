"""Parameter groups of torch's kind, chosen by pattern: which learning rate and decay each trained parameter gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import matches


def build_groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], config: MisaConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Sort the trained parameters into groups of equal settings.

    The first entry of ``config.parameter_groups`` whose pattern matches decides; what matches none forms the default
    group. Norms, biases (anything below two dimensions) and embeddings never decay, so a group that decays is split.

    Returns:
        The groups for ``torch.optim.Optimizer``, and each parameter's group index by name.

    Raises:
        ValueError: a pattern that matches no trained parameter.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    settings = [dict(group) for group in config.parameter_groups] + [{"pattern": None}]
    matched: set[int] = set()
    members: dict[tuple[int, bool], list[str]] = {}
    for name, parameter in parameters.items():
        entry = next(
            (index for index, group in enumerate(settings[:-1]) if matches(group["pattern"], name)), len(settings) - 1
        )
        matched.add(entry)
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        members.setdefault((entry, decays), []).append(name)
    for index, group in enumerate(settings[:-1]):
        if index not in matched:
            raise ValueError(
                f"parameter_groups pattern {group['pattern']!r} matches no parameter that is trained and not taken by "
                f"an earlier pattern; trained names look like {next(iter(parameters))!r}"
            )
    groups: list[dict[str, Any]] = []
    group_of: dict[str, int] = {}
    for (entry, decays), names in sorted(members.items(), key=lambda item: (-item[0][0], not item[0][1])):
        options = {key: value for key, value in settings[entry].items() if key != "pattern"}
        if not decays:
            options["weight_decay"] = 0.0
        group_of.update(dict.fromkeys(names, len(groups)))
        groups.append(
            {"params": [parameters[name] for name in names], "pattern": settings[entry]["pattern"], **options}
        )
    return groups, group_of
