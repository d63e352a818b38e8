//! `vine peers` and `vine status`: the mesh as one of its nodes sees it.

use clap::Args;
use hyper::Method;
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use super::mesh::{AskedNodeArgs, ask};
use super::table::Table;

#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Show it again every second until Ctrl-C.
    #[arg(long)]
    pub watch: bool,
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

pub async fn peers(args: &PeersArgs) -> anyhow::Result<()> {
    loop {
        let answer = ask(&args.node, Method::GET, "/mesh/peers", None).await?;
        let text = match args.node.json {
            true => answer.to_string(),
            false => table(&answer),
        };
        let mut out = std::io::stdout();
        if args.watch && !args.node.json && out.is_terminal() {
            // Home, and what is left of the last picture goes.
            write!(out, "\x1b[H\x1b[2J")?;
        }
        writeln!(out, "{}", text.trim_end())?;
        out.flush()?;
        if !args.watch {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
        }
    }
}

/// The node and its mesh in a few lines.
pub async fn status(args: &AskedNodeArgs) -> anyhow::Result<()> {
    let status = ask(args, Method::GET, "/mesh", None).await?;
    let peers = ask(args, Method::GET, "/mesh/peers", None).await?;
    if args.json {
        let mut status = status;
        status["members"] = peers["peers"].clone();
        println!("{status}");
        return Ok(());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let members = peers["peers"].as_array().map_or(&[][..], Vec::as_slice);
    let alive = members.iter().filter(|m| m["state"] == "alive").count();
    println!("node   {}", text(&status["node"]));
    println!("mesh   {}, {alive} of {} members alive", text(&status["mesh"]), members.len());
    let listens: Vec<String> =
        status["addresses"].as_array().into_iter().flatten().map(text).collect();
    println!("nodes  {}", listens.join(", "));
    println!("nat    {}", overlay(&status["overlay"]));
    let roles = text(&status["certificate"]["roles"]);
    let authority = match status["authority"]["this_node"] == true {
        true => ", one of its authorities",
        false => "",
    };
    println!("roles  {roles}{authority}");
    println!("\n{}", table(&peers).trim_end());
    Ok(())
}

/// What is known of this node's NAT, and how the overlay crosses it.
fn overlay(overlay: &Value) -> String {
    let Some(nat) = overlay["nat"].as_str() else { return "no overlay runs".to_owned() };
    let relays = overlay["relays"].as_array().map_or(0, Vec::len);
    format!(
        "{nat}; overlay: {} members direct, {} relayed, {relays} relays held",
        overlay["direct"], overlay["relayed"]
    )
}

/// The answer of `/mesh/peers` for people.
pub fn table(answer: &Value) -> String {
    let mut table = Table::new(&[
        "node", "name", "address", "state", "for", "rtt", "version", "models", "load",
    ]);
    for peer in answer["peers"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let short = text(&peer["node"]).chars().take(8).collect::<String>();
        let own = if peer["this_node"] == true { "*" } else { "" };
        let address = peer["addresses"].as_array().and_then(|a| a.first()).map_or("-".into(), text);
        let rtt = peer["rtt_ms"].as_f64().map_or("-".to_owned(), |ms| format!("{ms:.1} ms"));
        let models: Vec<String> =
            peer["models"].as_array().into_iter().flatten().map(model).collect();
        table.row(&[
            format!("{short}{own}"),
            text(&peer["name"]),
            address,
            text(&peer["state"]),
            span(peer["state_s"].as_f64().unwrap_or_default()),
            rtt,
            text(&peer["version"]),
            if models.is_empty() { "-".to_owned() } else { models.join(" ") },
            load(peer),
        ]);
    }
    table.to_string()
}

/// A model's name, with its state unless it is ready.
fn model(model: &Value) -> String {
    let name = model["model"].as_str().unwrap_or_default();
    match model["state"].as_str() {
        Some("ready") => name.to_owned(),
        Some(state) => format!("{name}({state})"),
        None => name.to_owned(),
    }
}

/// Sequences that run and wait, over all models.
fn load(peer: &Value) -> String {
    let sum = |field: &str| {
        let models = peer["models"].as_array().into_iter().flatten();
        models.filter_map(|m| m[field].as_u64()).sum::<u64>()
    };
    match peer["models"].as_array().is_some_and(|models| !models.is_empty()) {
        true => format!("{} running, {} waiting", sum("running"), sum("waiting")),
        false => "-".to_owned(),
    }
}

fn span(seconds: f64) -> String {
    match seconds as u64 {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
