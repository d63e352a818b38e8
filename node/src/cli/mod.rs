//! The command `vine`.

mod args;
mod bench;
mod chat;
mod client;
mod demo;
mod doctor;
mod explain;
mod fleet;
mod load;
mod local;
mod mesh;
mod model;
mod peers;
mod progress;
mod show;
mod system;
mod table;
mod up;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;

/// Runs the command line; the exit status is 0 only when all went well.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = start_log(&cli) {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(args) => block_on(demo::demo(&args)),
        Command::Up(args) => block_on(up::up(args)),
        Command::Peers(args) => block_on(peers::peers(&args)),
        Command::Status(args) => block_on(peers::status(&args)),
        Command::Explain(args) => block_on(explain::explain(&args)),
        Command::Invite(args) => block_on(mesh::invite(&args)),
        Command::Revoke(args) => block_on(mesh::revoke(&args)),
        Command::Leave(args) => block_on(mesh::leave(&args)),
        Command::Authority(args) => block_on(mesh::authority(&args)),
        Command::Chat(args) => block_on(chat::chat(&args)),
        Command::Models(args) => block_on(chat::models(&args)),
        Command::Run(args) => local::run(&args),
        Command::Eval(args) => local::eval(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Debug(command) => local::debug(&command),
        Command::Bench(args) => match args.load.endpoint.clone() {
            Some(endpoint) => block_on(load::bench_endpoint(&args, &endpoint)),
            None => bench::bench(&args),
        },
    }
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

fn start_log(cli: &Cli) -> anyhow::Result<()> {
    // libp2p's kad warns whenever it knows nobody, which is how every mesh begins. Who wants to hear it
    // says so: what comes later counts.
    let filter = tracing_subscriber::EnvFilter::try_new(format!("libp2p_kad=error,{}", cli.log))
        .map_err(|e| anyhow::anyhow!("--log {:?} is not a filter: {e}", cli.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log_json {
        true => log.json().init(),
        false => log.with_target(false).init(),
    }
    Ok(())
}

/// The reader of our output has gone, as `head` does: no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
