"""The ways to find masks that ``popup`` knows. A new one is a file of its own, and a name here."""

from __future__ import annotations

from randsurgery.jobs.fixed_masks import Rethreshold, Ticket
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.method import Method
from randsurgery.surgery.supermask import Supermask

METHODS: tuple[type[Method], ...] = (Popup, Supermask, Ticket, Rethreshold)

ALGORITHMS = {method.name: method for method in METHODS if method.chosen_by is None}
"""What ``--algorithm`` chooses from."""
