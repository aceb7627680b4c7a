"""Switch off the telemetry of libraries, unless the user has set their variables. No torch.

lora itself sends nothing. Each library reads its variable when it is imported, so this comes first.
"""

import os

# By variable, the value that switches off; found in the source, or in the documentation of an optional tracker.
VARIABLES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and what calls its send_telemetry: TRL, gradio
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: events to mobile.events.data.microsoft.com
    "MLFLOW_DISABLE_TELEMETRY": "true",  # mlflow
    "WANDB_ERROR_REPORTING": "false",  # wandb: reports of its own errors, not the runs that a recipe tracks
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio, which trackio's dashboard uses
}


def switch_off_telemetry() -> None:
    """Set the variables that are not set."""
    for name, off in VARIABLES.items():
        os.environ.setdefault(name, off)
