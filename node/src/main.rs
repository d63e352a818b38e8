//! The binary `vine`.

mod cli;

use std::process::ExitCode;

use node::mesh::overlay;

fn main() -> ExitCode {
    if let Err(error) = overlay::clear_key_log() {
        eprintln!("vine: {} is set and cannot be cleared ({error}): unset it", overlay::KEY_LOG);
        return ExitCode::FAILURE;
    }
    cli::main()
}
