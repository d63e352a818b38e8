//! A node that is nothing but an overlay, for tests of real networks (`tests/cluster/`) and to measure what
//! an overlay costs when it is idle.
//!
//! Prints one line for each event. Each line read from the standard input is broadcast; the end of the
//! input stops it.

use std::io::BufRead;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Parser;
use node::mesh::overlay::{Member, Overlay, OverlayConfig, OverlayEvent, Reachability};
use node::mesh::{Endpoint, MeshCounters, MeshLimits};
use node::metrics::Metrics;
use protocol::MeshId;
use protocol::identity::NodeKey;

#[derive(Parser)]
struct Arguments {
    /// The secret key is this byte, 32 times: for tests only.
    #[arg(long)]
    seed: u8,
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// probe, public or private
    #[arg(long, default_value = "probe")]
    reachability: String,
    #[arg(long)]
    mdns: bool,
    /// NODE or NODE=ADDRESS,ADDRESS…
    #[arg(long = "member")]
    members: Vec<String>,
    /// Prints the node's id and ends.
    #[arg(long)]
    id: bool,
    /// Prints the metrics at the end.
    #[arg(long)]
    metrics: bool,
}

fn member(text: &str) -> anyhow::Result<Member> {
    let (node, addresses) = text.split_once('=').unwrap_or((text, ""));
    let node = node.parse().with_context(|| format!("member {text}"))?;
    let addresses = addresses.split(',').filter(|a| !a.is_empty());
    let addresses = addresses.map(str::parse).collect::<Result<_, _>>()?;
    Ok(Member { node, addresses })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut config = OverlayConfig::new(MeshId([1; 32]));
    config.mdns = arguments.mdns;
    config.reachability = match arguments.reachability.as_str() {
        "probe" => Reachability::Probe,
        "public" => Reachability::Public,
        "private" => Reachability::Private,
        other => bail!("--reachability {other}: probe, public or private"),
    };
    config.members = arguments.members.iter().map(|m| member(m)).collect::<Result<_, _>>()?;
    let key = NodeKey::from_secret([arguments.seed; 32]);
    if arguments.id {
        println!("{}", key.id());
        return Ok(());
    }
    let metrics = Metrics::new()?;
    let limits = Arc::new(MeshLimits::default());
    let counters = Arc::<MeshCounters>::default();
    let endpoint = Endpoint::bind(&key, arguments.listen, limits, counters)?;
    tokio::spawn(endpoint.clone().serve_overlay());
    let (handle, mut events) = Overlay::start(config, &endpoint, metrics.overlay())?;
    let (lines, mut input) = tokio::sync::mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => print(&event),
                None => bail!("the overlay has ended"),
            },
            line = input.recv() => match line {
                Some(line) => handle.publish(line.into())?,
                None => break,
            },
        }
    }
    println!("status {:?}", handle.status());
    handle.shutdown().await;
    if arguments.metrics {
        print!("{}", metrics.render());
    }
    Ok(())
}

fn print(event: &OverlayEvent) {
    match event {
        OverlayEvent::Listening { address } => println!("listening {address}"),
        OverlayEvent::Discovered { node, addresses, how } => {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            println!("discovered {node} {how:?} {}", addresses.join(","));
        }
        OverlayEvent::Connected { node, path, .. } => println!("connected {node} {path:?}"),
        OverlayEvent::Disconnected { node } => println!("disconnected {node}"),
        OverlayEvent::Hears { node } => println!("hears {node}"),
        OverlayEvent::Observed { address, by } => println!("observed {address} {by}"),
        OverlayEvent::Reachable { nat } => println!("reachable {nat:?}"),
        OverlayEvent::RelayHeld { relay, address } => println!("relay-held {relay} {address}"),
        OverlayEvent::RelayLost { relay } => println!("relay-lost {relay}"),
        OverlayEvent::HolePunched { node, result } => println!("hole-punched {node} {result:?}"),
        OverlayEvent::Message { from, bytes } => {
            println!("message {from} {}", String::from_utf8_lossy(bytes));
        }
        OverlayEvent::CutOff { node, why } => println!("cut-off {node} {why:?}"),
        OverlayEvent::Restarted => println!("restarted"),
    }
}
