"""Who scores sequences: a model in this process, the student itself in another state, or what a model once said."""

from opd.teachers.base import Teacher, ask_teachers, asked_unevenly
from opd.teachers.cached import CachedTeacher, write_scores
from opd.teachers.local import LocalTeacher
from opd.teachers.own import SelfTeacher, WithoutAdapter

__all__ = [
    "CachedTeacher",
    "LocalTeacher",
    "SelfTeacher",
    "Teacher",
    "WithoutAdapter",
    "ask_teachers",
    "asked_unevenly",
    "write_scores",
]
