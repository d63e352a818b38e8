//! `vine bench --endpoint`: load on any OpenAI-compatible server, and what its clients felt.
//!
//! Closed loop: each client sends its next request when the last is answered. Open loop: requests
//! arrive at random with a given mean rate, whatever the answers do, which shows queues as they are.

use super::args::BenchArgs;
use super::client::Client;
use super::table::Table;
use anyhow::bail;
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// What one request felt.
#[derive(Clone, Debug)]
struct Sample {
    ttft_ms: f64,
    /// Each gap between events that carried text.
    itl_ms: Vec<f64>,
    e2e_ms: f64,
    output_tokens: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
}

/// The report, also as JSON.
#[derive(Debug, Serialize)]
struct Report {
    endpoint: String,
    model: String,
    clients: Option<usize>,
    rate: Option<f64>,
    requests: usize,
    failed: usize,
    seconds: f64,
    output_tokens_per_second: f64,
    requests_per_second: f64,
    /// Requests per second that met both objectives.
    goodput: f64,
    prompt_tokens: f64,
    cached_tokens: f64,
    ttft_ms: Quantiles,
    itl_ms: Quantiles,
    tpot_ms: Quantiles,
    e2e_ms: Quantiles,
    errors: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct Quantiles {
    p50: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

pub async fn bench_endpoint(args: &BenchArgs, endpoint: &str) -> anyhow::Result<()> {
    let client = Client::new(endpoint, args.load.key.clone())?;
    let model = client.model(args.load.served_model.as_deref()).await?;
    let plan = Arc::new(Plan::new(args, model));
    // One request outside the measurement: connections, lazy allocations. It shares no prefix with
    // those that are measured, which may want theirs cold.
    ask(&client, &plan.warm_up()).await?;
    let start = Instant::now();
    let results = match args.load.rate {
        None => closed_loop(&client, &plan, args.load.clients).await,
        Some(rate) => open_loop(&client, &plan, rate).await?,
    };
    let report = Report::new(args, &client, &plan, start.elapsed(), results);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    if report.failed > 0 {
        bail!(
            "{} of {} requests failed: {}",
            report.failed,
            report.requests,
            report.errors.join("; ")
        );
    }
    Ok(())
}

/// The requests to send: all different, reproducible.
struct Plan {
    model: String,
    prompt_words: usize,
    shared_words: usize,
    max_tokens: usize,
    requests: usize,
}

impl Plan {
    fn new(args: &BenchArgs, model: String) -> Self {
        Plan {
            model,
            prompt_words: args.prompt.first().copied().unwrap_or(512),
            shared_words: args.load.shared_prefix,
            max_tokens: args.generate.first().copied().unwrap_or(128),
            requests: args.load.requests,
        }
    }

    fn body(&self, index: usize) -> Value {
        let shared = words(u64::MAX, self.shared_words);
        let own = words(index as u64, self.prompt_words.saturating_sub(self.shared_words).max(1));
        self.request(format!("{shared}{own}"))
    }

    fn warm_up(&self) -> Value {
        self.request(words(u64::MAX - 1, self.prompt_words.clamp(1, WARM_UP_WORDS_MAX)))
    }

    fn request(&self, prompt: String) -> Value {
        json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        })
    }
}

/// Plain words of one or two tokens in any vocabulary, chosen by a fixed generator.
fn words(seed: u64, count: usize) -> String {
    const WORDS: [&str; 16] = [
        "time", "water", "house", "light", "paper", "green", "stone", "river", "music", "table",
        "north", "bread", "cloud", "field", "glass", "night",
    ];
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut text = String::new();
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(WORDS[(state >> 60) as usize]);
        text.push(' ');
    }
    text
}

type Outcome = Result<Sample, String>;

async fn closed_loop(client: &Client, plan: &Arc<Plan>, clients: usize) -> Vec<Outcome> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..clients.clamp(1, CLIENTS_MAX) {
        let (client, plan, next) = (client.clone(), plan.clone(), next.clone());
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= plan.requests {
                    return outcomes;
                }
                outcomes.push(ask(&client, &plan.body(index)).await.map_err(|e| format!("{e:#}")));
            }
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn open_loop(client: &Client, plan: &Arc<Plan>, rate: f64) -> anyhow::Result<Vec<Outcome>> {
    if !(rate > 0.0 && rate.is_finite()) {
        bail!("--rate must be above 0");
    }
    let mut tasks = JoinSet::new();
    let mut arrival = tokio::time::Instant::now();
    for index in 0..plan.requests {
        tokio::time::sleep_until(arrival).await;
        let (client, plan) = (client.clone(), plan.clone());
        tasks.spawn(
            async move { ask(&client, &plan.body(index)).await.map_err(|e| format!("{e:#}")) },
        );
        arrival += exponential(index as u64, rate);
    }
    Ok(tasks.join_all().await)
}

/// Gap between Poisson arrivals, from a fixed generator.
fn exponential(index: u64, rate: f64) -> Duration {
    let hash = blake3::hash(&index.to_le_bytes());
    let bits = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("32 bytes have 8")) >> 11;
    let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    Duration::from_secs_f64(-uniform.ln() / rate)
}

async fn ask(client: &Client, body: &Value) -> anyhow::Result<Sample> {
    let start = Instant::now();
    let mut stream = client.stream("/v1/completions", body).await?;
    let mut first = None;
    let mut last = start;
    let mut itl_ms = Vec::new();
    let mut usage = Value::Null;
    while let Some(event) = stream.next().await? {
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
        let Some(choice) = event["choices"].get(0) else { continue };
        if choice["text"].as_str().is_none_or(str::is_empty) && first.is_some() {
            continue;
        }
        let now = Instant::now();
        match first {
            None => first = Some(now),
            Some(_) => itl_ms.push(ms(now - last)),
        }
        last = now;
    }
    let Some(first) = first else { bail!("the answer had no tokens") };
    let count = |value: &Value| value.as_u64().map(|n| n as usize);
    Ok(Sample {
        ttft_ms: ms(first - start),
        e2e_ms: ms(last - start),
        output_tokens: count(&usage["completion_tokens"]).unwrap_or(itl_ms.len() + 1),
        prompt_tokens: count(&usage["prompt_tokens"]).unwrap_or(0),
        cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0),
        itl_ms,
    })
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Sample {
    /// Time per output token after the first; `None` for answers of one token.
    fn tpot_ms(&self) -> Option<f64> {
        (self.output_tokens > 1)
            .then(|| (self.e2e_ms - self.ttft_ms) / (self.output_tokens - 1) as f64)
    }
}

impl Report {
    fn new(
        args: &BenchArgs,
        client: &Client,
        plan: &Plan,
        elapsed: Duration,
        results: Vec<Outcome>,
    ) -> Self {
        let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        let samples: Vec<Sample> = good.into_iter().flatten().collect();
        let mut errors: Vec<String> = bad.into_iter().filter_map(Result::err).collect();
        let failed = errors.len();
        errors.sort();
        errors.dedup();
        errors.truncate(5);
        let seconds = elapsed.as_secs_f64();
        let met = |s: &&Sample| {
            s.ttft_ms <= args.load.slo_ttft_ms
                && s.tpot_ms().is_none_or(|t| t <= args.load.slo_tpot_ms)
        };
        let mean = |f: fn(&Sample) -> usize| {
            samples.iter().map(f).sum::<usize>() as f64 / samples.len().max(1) as f64
        };
        let tokens: usize = samples.iter().map(|s| s.output_tokens).sum();
        Report {
            endpoint: client.base().to_owned(),
            model: plan.model.clone(),
            clients: args.load.rate.is_none().then_some(args.load.clients),
            rate: args.load.rate,
            requests: samples.len() + failed,
            failed,
            seconds,
            output_tokens_per_second: tokens as f64 / seconds,
            requests_per_second: samples.len() as f64 / seconds,
            goodput: samples.iter().filter(met).count() as f64 / seconds,
            prompt_tokens: mean(|s| s.prompt_tokens),
            cached_tokens: mean(|s| s.cached_tokens),
            ttft_ms: Quantiles::of(samples.iter().map(|s| s.ttft_ms)),
            itl_ms: Quantiles::of(samples.iter().flat_map(|s| s.itl_ms.iter().copied())),
            tpot_ms: Quantiles::of(samples.iter().filter_map(Sample::tpot_ms)),
            e2e_ms: Quantiles::of(samples.iter().map(|s| s.e2e_ms)),
            errors,
        }
    }

    fn print(&self) {
        let mode = match (self.clients, self.rate) {
            (Some(clients), _) => format!("{clients} clients"),
            (_, Some(rate)) => format!("{rate} requests/s"),
            _ => String::new(),
        };
        println!(
            "{} at {}, {mode}, {} requests in {:.1} s",
            self.model, self.endpoint, self.requests, self.seconds
        );
        println!(
            "output {:.1} tokens/s   {:.2} requests/s   goodput {:.2}/s   prompt {:.0} tokens, {:.0} of them cached",
            self.output_tokens_per_second,
            self.requests_per_second,
            self.goodput,
            self.prompt_tokens,
            self.cached_tokens
        );
        let mut table = Table::new(&["ms", "p50", "p95", "p99", "max"]);
        for (name, q) in [
            ("TTFT", &self.ttft_ms),
            ("ITL", &self.itl_ms),
            ("TPOT", &self.tpot_ms),
            ("end to end", &self.e2e_ms),
        ] {
            let cell = |x: f64| format!("{x:.1}");
            table.row(&[name.to_owned(), cell(q.p50), cell(q.p95), cell(q.p99), cell(q.max)]);
        }
        print!("{table}");
    }
}

impl Quantiles {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let rank = (q * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Quantiles { p50: at(0.5), p95: at(0.95), p99: at(0.99), max: at(1.0) }
    }
}

/// A warm-up need not be long.
const WARM_UP_WORDS_MAX: usize = 32;
/// Most clients of a closed loop.
const CLIENTS_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_by_nearest_rank() {
        let q = Quantiles::of((1..=100).rev().map(f64::from));
        assert_eq!((q.p50, q.p95, q.p99, q.max), (50.0, 95.0, 99.0, 100.0));
        assert_eq!(Quantiles::of(std::iter::empty()).max, 0.0);
    }

    #[test]
    fn prompts_are_reproducible_and_differ() {
        assert_eq!(words(3, 20), words(3, 20));
        assert_ne!(words(3, 20), words(4, 20));
        assert_eq!(words(1, 7).split_whitespace().count(), 7);
    }

    #[test]
    fn arrivals_have_the_mean_rate() {
        let total: Duration = (0..2000).map(|i| exponential(i, 10.0)).sum();
        let mean_ms = total.as_secs_f64() * 1e3 / 2000.0;
        assert!((mean_ms - 100.0).abs() < 8.0, "{mean_ms} ms");
    }
}
