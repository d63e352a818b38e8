//! What it costs that a token passes through the node that the client asked: latency and CPU.
//!
//! Two nodes, each a process of its own: one serves a replica that says nothing but the time, the other
//! is an entrance without a model. Each token's text is the moment at which the replica made it, so a
//! client on the same host reads the age of every token as it arrives. Streams from the serving node and
//! through the entrance alternate; the difference between them is what the entrance adds. A third way
//! leads through a plain TCP relay, which shows what passing through any process costs on this host.
//!
//! `cargo run --release -p grapevine-node --example proxy_cost -- --streams 16`

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::Parser;

#[path = "../../tests/api/byte_tokenizer.rs"]
mod byte_tokenizer;
mod clock_replica;
mod relay;

#[derive(Clone, Parser)]
struct Arguments {
    /// Streams at once.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Milliseconds between two tokens of a stream.
    #[arg(long, default_value_t = 5)]
    gap_ms: u64,
    /// Tokens of a stream.
    #[arg(long, default_value_t = 400)]
    tokens: usize,
    /// Streams each way, one after the other.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Is a node instead: for this program itself.
    #[arg(long, hide = true)]
    node: bool,
    #[arg(long, hide = true)]
    join: Option<String>,
    /// Is a relay to this address instead.
    #[arg(long, hide = true)]
    relay: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.node {
        let gap = Duration::from_millis(arguments.gap_ms);
        return clock_replica::run_node(gap, arguments.join.as_deref());
    }
    if let Some(target) = &arguments.relay {
        return relay::run_relay(target);
    }
    let gap = format!("--gap-ms={}", arguments.gap_ms);
    let mut serving = Process::start(&["--node", &gap])?;
    let entrance = Process::start(&["--node", &gap, &format!("--join={}", serving.token)])?;
    let relay = Process::start(&[&format!("--relay={}", serving.address)])?;
    entrance.wait_for_model()?;
    // Connections, caches and the router are warm.
    for process in [&serving, &entrance, &relay] {
        measure(process, &arguments)?;
    }
    let [mut direct, mut proxied, mut relayed] = [(); 3].map(|()| Measured::default());
    for _ in 0..arguments.rounds {
        let idle = entrance.cpu()?;
        direct.add(measure(&serving, &arguments)?);
        let busy = entrance.cpu()?;
        proxied.add(measure(&entrance, &arguments)?);
        // What the entrance does in any case, as membership, is measured while it passes nothing on.
        let passing = (entrance.cpu()? - busy).saturating_sub(busy - idle);
        proxied.cpu += passing;
        relayed.add(measure(&relay, &arguments)?);
    }
    serving.end();
    report(&arguments, direct, proxied, relayed);
    Ok(())
}

/// Ages of tokens on arrival, in microseconds.
#[derive(Default)]
struct Measured {
    ages_us: Vec<f64>,
    cpu: Duration,
}

impl Measured {
    fn add(&mut self, ages_us: Vec<f64>) {
        self.ages_us.extend(ages_us);
    }

    fn quantile(&mut self, q: f64) -> f64 {
        self.ages_us.sort_by(f64::total_cmp);
        self.ages_us[((self.ages_us.len() - 1) as f64 * q) as usize]
    }
}

fn report(
    arguments: &Arguments,
    mut direct: Measured,
    mut proxied: Measured,
    mut relayed: Measured,
) {
    let Arguments { streams, gap_ms, .. } = arguments;
    println!(
        "{streams} stream(s), a token each {gap_ms} ms, {} tokens each way",
        proxied.ages_us.len()
    );
    println!(
        "{:>10} {:>12} {:>12} {:>12} {:>16}",
        "", "direct us", "proxied us", "added us", "TCP relay adds"
    );
    for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)] {
        let (direct, proxied) = (direct.quantile(q), proxied.quantile(q));
        let (added, floor) = (proxied - direct, relayed.quantile(q) - direct);
        println!("{name:>10} {direct:>12.1} {proxied:>12.1} {added:>12.1} {floor:>16.1}");
    }
    let per_token = proxied.cpu.as_secs_f64() * 1e6 / proxied.ages_us.len() as f64;
    println!("CPU of the entrance: {per_token:.1} us for each token");
}

/// Runs all streams of a round at a process.
fn measure(at: &Process, arguments: &Arguments) -> anyhow::Result<Vec<f64>> {
    let streams: Vec<_> = (0..arguments.streams)
        .map(|_| {
            let (address, tokens) = (at.address.clone(), arguments.tokens);
            thread::spawn(move || stream(&address, tokens))
        })
        .collect();
    let mut ages_us = Vec::new();
    for stream in streams {
        ages_us.extend(stream.join().expect("a stream's thread does not panic")?);
    }
    Ok(ages_us)
}

/// One streamed completion; the age of each token. The first is left out: it pays for the connection.
fn stream(address: &str, tokens: usize) -> anyhow::Result<Vec<f64>> {
    let body = format!(r#"{{"model":"m","prompt":"x","stream":true,"max_tokens":{tokens}}}"#);
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut reader = BufReader::new(connection);
    let (mut ages_us, mut line) = (Vec::with_capacity(tokens), String::new());
    while reader.read_line(&mut line)? > 0 {
        if let Some((_, text)) = line.split_once(r#""text":""#)
            && let Some((stamp, _)) = text.split_once(' ')
        {
            ages_us.push(now_ns().saturating_sub(stamp.parse()?) as f64 / 1e3);
        }
        line.clear();
    }
    ensure!(ages_us.len() == tokens, "{} of {tokens} tokens came from {address}", ages_us.len());
    ages_us.remove(0);
    Ok(ages_us)
}

/// This program as a node or as the relay.
struct Process {
    child: Child,
    address: String,
    token: String,
}

impl Process {
    fn start(arguments: &[&str]) -> anyhow::Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let out = child.stdout.take().context("the process has an output")?;
        BufReader::new(out).read_line(&mut line)?;
        let Some((address, token)) = line.trim().split_once(' ') else {
            bail!("a process did not start: {line:?}")
        };
        Ok(Process { child, address: address.to_owned(), token: token.to_owned() })
    }

    fn wait_for_model(&self) -> anyhow::Result<()> {
        for _ in 0..200 {
            if stream(&self.address, 2).is_ok() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("the entrance does not know the model")
    }

    /// CPU time that all its threads have used.
    fn cpu(&self) -> anyhow::Result<Duration> {
        let mut total = Duration::ZERO;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let running_ns = text.split(' ').next().context("schedstat has numbers")?.parse()?;
            total += Duration::from_nanos(running_ns);
        }
        Ok(total)
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// The clock of the host, which all processes share.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
