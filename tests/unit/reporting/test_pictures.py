"""What stands alone between two breaks is drawn too."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.image import imread

from megatron_dllm.reporting.pictures import schedule_picture
from tests.unit.reporting.folders import training_record


def num_red_points(records: list[dict[str, Any]]) -> int:
    """Pixels of the learning rate's colour, its label at the left edge apart."""
    image = imread(io.BytesIO(schedule_picture(records)))[:, :, :3]
    image = image[:, image.shape[1] // 8 :]
    return int((np.abs(image - np.array([0xD1, 0x49, 0x5B]) / 255).max(-1) < 0.02).sum())


def test_a_run_of_one_logged_step_has_a_learning_rate() -> None:
    (record,) = [training_record(4)]
    assert num_red_points([record]) > 0
    assert num_red_points([{name: value for name, value in record.items() if name != "learning_rate"}]) == 0
