//! The binary `vine`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
