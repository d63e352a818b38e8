//! A node on a free loopback port, with a replica that plays a script, and a small client.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use engine::chat::ChatTemplate;
use engine::replica::{Event, Events, FinishReason, GenerateRequest, RequestError};
use engine::sampler::SampledToken;
use node::replica::{Core, Stats, StepReport, Work};
use node::{Loaded, ModelOptions, Node, NodeOptions};
use protocol::{Duration, Instant, RequestId, TokenId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::byte_tokenizer::byte_tokenizer;

/// What a scripted replica says, again and again.
pub const TEXT: &str = "one two ";
/// A prompt with this makes the replica panic in its next step.
pub const PANIC: &str = "<<panic>>";
/// A prompt with this fails in its first step.
pub const BROKEN: &str = "<<broken>>";
/// A prompt with this is refused as if the queue were full.
pub const FULL: &str = "<<full>>";

/// Controls a scripted replica from a test.
#[derive(Default)]
pub struct Control {
    /// While set, each choice stops after its second token.
    pub hold: AtomicBool,
    /// How often it was asked for an answer.
    pub asked: AtomicUsize,
    /// Said once instead of [`TEXT`], until its end.
    pub once: Mutex<Option<&'static str>>,
}

/// A replica without a model: it answers every prompt with [`TEXT`].
pub struct Script {
    control: Arc<Control>,
    jobs: BTreeMap<RequestId, Job>,
}

enum Job {
    Generate { request: Box<GenerateRequest>, said: usize },
    Embed(Vec<TokenId>),
    Score(Vec<TokenId>),
}

impl Script {
    pub fn new(control: Arc<Control>) -> Self {
        Script { control, jobs: BTreeMap::new() }
    }
}

fn text_of(tokens: &[TokenId]) -> String {
    let bytes = tokens.iter().filter_map(|&t| u8::try_from(t.checked_sub(SPECIALS)?).ok());
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

fn sampled(token: TokenId) -> SampledToken {
    SampledToken { token, logprob: -0.5, top: vec![(token, -0.5), (token + 1, -1.5)] }
}

impl Core for Script {
    fn submit(&mut self, _now: Instant, work: Work) -> Result<Vec<Event>, RequestError> {
        let id = work.request();
        let mut replayed = Vec::new();
        let job = match work {
            Work::Generate(request) => {
                request.sampling.validate(VOCAB)?;
                let text = text_of(&request.prompt);
                if text.contains(FULL) {
                    return Err(RequestError::QueueFull { retry_after: Duration::from_secs(7) });
                }
                if request.prompt.len() > CONTEXT {
                    let tokens = request.prompt.len();
                    return Err(RequestError::TooLong { tokens, limit: CONTEXT });
                }
                self.control.asked.fetch_add(1, Ordering::SeqCst);
                let said = replay(&request, &mut replayed);
                Job::Generate { request, said }
            }
            Work::Embed(request) => Job::Embed(request.tokens),
            Work::Score(request) => Job::Score(request.tokens),
        };
        self.jobs.insert(id, job);
        Ok(replayed)
    }

    fn cancel(&mut self, _now: Instant, request: RequestId) {
        self.jobs.remove(&request);
    }

    fn step(&mut self, clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport {
        let hold = self.control.hold.load(Ordering::SeqCst);
        let mut tokens = 0;
        let mut done = Vec::new();
        for (&id, job) in &mut self.jobs {
            match job {
                Job::Generate { request, said } => {
                    assert!(!text_of(&request.prompt).contains(PANIC), "as the test asked");
                    let late = request.deadline.is_some_and(|deadline| deadline <= clock());
                    if late || text_of(&request.prompt).contains(BROKEN) {
                        let error = match late {
                            true => RequestError::DeadlineExceeded,
                            false => RequestError::Grammar("as the test asked".to_owned()),
                        };
                        events.push((id, Event::Failed { choice: 0, error }));
                        done.push(id);
                        continue;
                    }
                    if hold && *said >= 2 {
                        continue;
                    }
                    let once = *self.control.once.lock().expect("not poisoned");
                    let ended = say(id, request, once, *said, events);
                    *said += 1;
                    tokens += request.choices;
                    if ended {
                        done.push(id);
                    }
                }
                Job::Embed(prompt) => {
                    let sum = prompt.iter().sum::<TokenId>() as f32;
                    let length = (sum * sum + 1.0).sqrt();
                    let vector = vec![sum / length, 1.0 / length];
                    events.push((id, Event::Embedding { vector }));
                    done.push(id);
                }
                Job::Score(prompt) => {
                    let score = |(i, &t)| (i > 0).then(|| sampled(t));
                    let tokens = prompt.iter().enumerate().map(score).collect();
                    events.push((id, Event::Scores { tokens }));
                    done.push(id);
                }
            }
        }
        for id in done {
            self.jobs.remove(&id);
        }
        StepReport { tokens }
    }

    fn stats(&self) -> Stats {
        let used = self.jobs.len();
        Stats {
            blocks_free: 100 - used,
            blocks_used: used,
            blocks_cached: 0,
            running: used,
            waiting: 0,
            prompt_tokens_left: 0,
            prompt_rate: 0,
            decode_step: Duration::ZERO,
            preemptions: 0,
            tiers: None,
            block_time_below: Duration::ZERO,
        }
    }
}

/// Says again what was said before; how many tokens that is of each choice.
fn replay(request: &GenerateRequest, events: &mut Vec<Event>) -> usize {
    for (choice, resumed) in request.resume.iter().enumerate() {
        for (index, sampled) in resumed.tokens.iter().enumerate() {
            let text = text_of(&[sampled.token]);
            let (index, sampled) = (index as u64, sampled.clone());
            events.push(Event::Token { choice, index, sampled, text });
        }
    }
    request.resume.first().map_or(0, |resumed| resumed.tokens.len())
}

/// One token for each choice; true when the request is complete.
fn say(
    id: RequestId,
    request: &GenerateRequest,
    once: Option<&str>,
    said: usize,
    events: &mut Events,
) -> bool {
    let text = once.unwrap_or(TEXT);
    let byte = text.as_bytes()[said % text.len()];
    let complete = once.is_some() && said + 1 == text.len();
    let last = complete || request.max_tokens.is_some_and(|max| said + 1 >= max);
    let reason = if complete { FinishReason::Stop } else { FinishReason::Length };
    for choice in 0..request.choices {
        if said == 0 {
            events.push((id, Event::Started { choice, cached_tokens: 1 }));
        }
        let text = char::from(byte).to_string();
        let sampled = sampled(SPECIALS + TokenId::from(byte));
        events.push((id, Event::Token { choice, index: said as u64, sampled, text }));
        if last {
            let text = String::new();
            events.push((id, Event::Finished { choice, reason, text, generated: said + 1 }));
        }
    }
    last
}

pub fn scripted(control: Arc<Control>) -> Loaded {
    Loaded {
        tokenizer: byte_tokenizer(),
        template: Some(ChatTemplate::chatml()),
        vocab: VOCAB,
        hidden: 2,
        context_tokens_max: CONTEXT,
        fingerprint: "fp_test".to_owned(),
        kv_bytes_per_token: 0,
        namer: None,
        core: Box::new(Script::new(control)),
    }
}

pub fn scripted_model(id: &str, control: &Arc<Control>) -> ModelOptions {
    let control = control.clone();
    ModelOptions { id: id.to_owned(), loader: Box::new(move |_| Ok(scripted(control))) }
}

pub fn options(control: &Arc<Control>) -> NodeOptions {
    NodeOptions::new(loopback(), vec![scripted_model("m", control)])
}

pub fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub async fn start(options: NodeOptions) -> Node {
    let node = node::serve(options).await.expect("the node starts");
    node.ready().await.expect("its models load");
    node
}

/// An answer, read to its end.
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// `error.code` and `error.param`.
    pub fn error(&self) -> (String, Option<String>) {
        let error = &self.json()["error"];
        let param = error["param"].as_str().map(str::to_owned);
        (error["code"].as_str().unwrap_or_default().to_owned(), param)
    }

    /// Events of a stream: (event, id, data).
    pub fn events(&self) -> Vec<(Option<String>, String, String)> {
        self.body
            .split("\n\n")
            .filter(|e| !e.is_empty() && !e.starts_with(':'))
            .map(event)
            .collect()
    }
}

fn event(text: &str) -> (Option<String>, String, String) {
    let field = |name: &str| {
        let of = |line: &str| line.strip_prefix(name).map(str::to_owned);
        text.lines().find_map(of)
    };
    // An error is no part of the answer, and has no id.
    let (kind, id) = (field("event: "), field("id: "));
    assert!(id.is_some() != kind.is_some(), "{text}");
    (kind, id.unwrap_or_default(), field("data: ").unwrap_or_else(|| panic!("no data: {text}")))
}

/// A connection that has sent a request.
pub struct Call {
    stream: TcpStream,
    read: Vec<u8>,
}

/// Sends a request with `connection: close` and whatever headers are given.
pub async fn send(node: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> Call {
    let mut stream = TcpStream::connect(node).await.expect("the node accepts");
    let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
    if !headers.to_ascii_lowercase().contains("host:") {
        head += &format!("host: {node}\r\n");
    }
    if !body.is_empty() && !headers.contains("content-type:") {
        head += "content-type: application/json\r\n";
    }
    if !headers.contains("content-length:") {
        head += &format!("content-length: {}\r\n", body.len());
    }
    head += &format!("{headers}\r\n");
    stream.write_all(head.as_bytes()).await.expect("the head is sent");
    // A node that refuses the head may close before it has read the body.
    let _ = stream.write_all(body).await;
    Call { stream, read: Vec::new() }
}

impl Call {
    /// Reads until the answer contains `text`; gives what was read so far.
    pub async fn read_until(&mut self, text: &str) -> String {
        let contains = |read: &[u8]| String::from_utf8_lossy(read).contains(text);
        while !contains(&self.read) {
            let count = self.stream.read_buf(&mut self.read).await.expect("the answer goes on");
            let read = String::from_utf8_lossy(&self.read);
            assert!(count > 0, "the answer ended before {text:?}: {read}");
        }
        String::from_utf8_lossy(&self.read).into_owned()
    }

    /// Reads to the end.
    pub async fn finish(mut self) -> Answer {
        self.stream.read_to_end(&mut self.read).await.expect("the answer ends");
        parse(&self.read)
    }
}

pub async fn post(node: &Node, path: &str, body: &Value) -> Answer {
    send(node.address(), "POST", path, "", body.to_string().as_bytes()).await.finish().await
}

pub async fn get(node: &Node, path: &str) -> Answer {
    send(node.address(), "GET", path, "", b"").await.finish().await
}

/// A chat with `extra` laid over its fields.
pub fn chat(extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": "hi"}]);
    merged(json!({"model": "m", "messages": messages, "max_tokens": 7}), extra)
}

pub fn merged(mut body: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// The value of the first metric line that contains all parts.
pub async fn metric(node: &Node, parts: &[&str]) -> Option<f64> {
    let text = get(node, "/metrics").await.body;
    let matches = |line: &&str| !line.starts_with('#') && parts.iter().all(|p| line.contains(p));
    text.lines().find(matches).and_then(|line| line.rsplit(' ').next()?.parse().ok())
}

/// Asks for a metric until it has a value. Each round is a request to the node, not a pause.
pub async fn metric_becomes(node: &Node, parts: &[&str], value: f64) {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while metric(node, parts).await != Some(value) {
        assert!(std::time::Instant::now() < until, "{parts:?} did not become {value}");
    }
}

fn parse(read: &[u8]) -> Answer {
    let split = read.windows(4).position(|w| w == b"\r\n\r\n").expect("a complete head");
    let head = String::from_utf8_lossy(&read[..split]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().and_then(|l| l.split(' ').nth(1)?.parse().ok()).expect("a status");
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let chunked = headers.get("transfer-encoding").is_some_and(|v| v == "chunked");
    let body = &read[split + 4..];
    let body = if chunked { unchunk(body) } else { body.to_vec() };
    Answer { status, headers, body: String::from_utf8(body).expect("a text") }
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).expect("a chunk size");
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk size");
        let rest = &body[end + 2..];
        if size == 0 || rest.len() < size + 2 {
            break;
        }
        whole.extend_from_slice(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}

/// Lets a test decide when something goes on.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn open(&self) {
        *self.open.lock().expect("not poisoned") = true;
        self.changed.notify_all();
    }

    pub fn pass(&self) {
        let mut open = self.open.lock().expect("not poisoned");
        while !*open {
            open = self.changed.wait(open).expect("not poisoned");
        }
    }
}

pub const SPECIALS: TokenId = 3;
pub const VOCAB: usize = 259;
pub const CONTEXT: usize = 4096;
