"""Shipped configurations: every key is taken, changes something, and the run fits on the card that is named."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from chinese_llama.config import load_yaml
from chinese_llama.quickstart.pipeline import recipe as module
from chinese_llama.resources import shipped
from chinese_llama.train.estimate import Estimate, Settings, estimate, settings_of
from chinese_llama.train.fields import DEFAULTS, Fields, PretrainingFields, Recipe, TuningFields, resolve
