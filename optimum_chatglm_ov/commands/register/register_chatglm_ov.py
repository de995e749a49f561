# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli export chatglm-ov`: installed into `optimum.commands.register`, where optimum-cli finds it."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class ChatGLMExportCommand(BaseOptimumCLICommand):
    """The same as `chatglm-ov export`, with the model given as `--model` like in all commands of optimum-cli."""

    COMMAND = CommandInfo(name="chatglm-ov", help="Export original ChatGLM checkpoints to OpenVINO IR.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        if ChatGLMExportCommand.COMMAND.name not in sys.argv:
            return  # the other sub-commands need not wait for our imports
        from optimum_chatglm_ov.cli.export import add_options

        parser.add_argument("-m", "--model", required=True, help="Hub id or folder of an original checkpoint")
        parser.add_argument("output", type=Path, help="folder to write")
        add_options(parser)

    def run(self) -> None:
        from optimum_chatglm_ov.cli.export import run
        from optimum_chatglm_ov.cli.main import run_command

        sys.exit(run_command(run, self.args, name="optimum-cli export chatglm-ov"))


REGISTER_COMMANDS = [(ChatGLMExportCommand, ExportCommand)]
