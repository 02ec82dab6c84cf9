"""Draw the README's figure from a results file: python docs/draw.py benchmarks/results/digits_demo.json docs/x.svg"""

import json
import sys
from pathlib import Path

from hwprune.report import figure

source, out = map(Path, sys.argv[1:])
(row,) = json.loads(source.read_text())["rows"]
out.write_text(figure(row), encoding="utf-8")
