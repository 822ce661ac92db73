"""Errors cross processes: jobs and processes of a run send them by pickle."""

from __future__ import annotations

import inspect
import pickle

import pytest

from ebm_prior import errors

ARGUMENTS = {errors.SettingError: ("energy_channels", "must be positive, found 0"), errors.Stopped: (15, 300)}
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_in_another_process(kind: type[BaseException]) -> None:
    error = kind(*ARGUMENTS.get(kind, ("a message",)))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))
