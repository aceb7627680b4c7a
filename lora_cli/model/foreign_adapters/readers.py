"""Table of the readers of other tools' adapters, by the value of `lora adapter convert --from`."""

from collections.abc import Callable

from lora_cli.model.foreign_adapters import litgpt, mlx, pickled_peft, torchtune
from lora_cli.model.foreign_adapters.detect import Found
from lora_cli.model.foreign_adapters.pickled_peft import PickledPeft
from lora_cli.model.foreign_adapters.source_adapter import SourceAdapter

# The names of their files are in detect.TOOLS, which is without torch.
READERS: dict[str, Callable[[Found], SourceAdapter | PickledPeft]] = {
    "mlx": mlx.read,
    "litgpt": litgpt.read,
    "torchtune": torchtune.read,
    "bin": pickled_peft.read,
}
