"""The annotated shapes are checked while the tests run: a wrong one is caught."""

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import t2t_ref
from t2t_ref.models.tokens_to_token import restructure


def test_a_wrong_annotation_is_caught():
    @jaxtyped(typechecker=beartype)
    def wrong(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d n"]:
        return tokens

    with pytest.raises(TypeCheckError, match="return value"):
        wrong(torch.zeros(1, 3, 5))


def test_the_package_itself_is_under_the_checks():
    with pytest.raises(TypeCheckError, match="tokens"):
        restructure(torch.zeros(3136, 64), (56, 56))  # no batch axis
    with pytest.raises(TypeCheckError):
        t2t_ref.soft_split(torch.zeros(1, 3, 8, 8, dtype=torch.int64), 3, 2, 1)  # not floating point
    with pytest.raises(TypeCheckError):  # every forward, not functions alone
        t2t_ref.TokenPerformer(147)(torch.zeros(1, 147))
