//! The `forkyard` command: supervises an application in any language.

use std::process::ExitCode;

fn main() -> ExitCode {
    forkyard::command_line()
}
