//! Commands that use a model in this process, without a node: run, eval, debug.

use super::args::{
    DebugCommand, DetokenizeArgs, EvalArgs, LogitsArgs, RunArgs, TemplateArgs, TokenizeArgs,
};
use super::model::{LoadedModel, ModelSpec, OpenModel, Sizing, executor, load};
use super::progress::LoadBar;
use anyhow::{Context, bail};
use cache::BlockId;
use engine::chat::{Calendar, ChatInput, ChatTemplate, Prompt};
use engine::replica::{Event, FinishReason, GenerateRequest, Replica, ScoreRequest};
use engine::sampler::SamplingParams;
use engine::tokenizer::Tokenizer;
use protocol::{Instant, RequestId, SequenceId, TenantId, TokenId};
use scheduler::{LogitsWanted, SequenceStep, StepPlan};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{BufWriter, IsTerminal, Read, Write};

/// Loads a model with a progress bar on the terminal.
pub fn load_model(spec: &str, args: &super::args::EngineArgs) -> anyhow::Result<LoadedModel> {
    let spec = ModelSpec::parse(spec)?;
    let bar = LoadBar::new(&spec.name);
    let loaded = load(spec.open()?, args, [0; 32], &mut |done| bar.set(done));
    bar.clear();
    loaded
}

/// A clock for a machine that runs in this process.
pub fn clock() -> impl Fn() -> Instant {
    let origin = std::time::Instant::now();
    move || Instant::from_nanos(u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

#[derive(Debug, Serialize)]
struct RunReport {
    tokens: Vec<TokenId>,
    text: String,
    prompt_tokens: usize,
    finish_reason: &'static str,
    ttft_ms: f64,
    tokens_per_second: f64,
}

pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let LoadedModel { mut replica, template, .. } = load_model(&args.model, &args.engine)?;
    let text = read_text(&args.prompt)?;
    let prompt = if args.tokens {
        parse_ids(&text)?
    } else if args.chat {
        let messages = json!([{ "role": "user", "content": text }]);
        render(replica.tokenizer(), &template, messages)?.tokens
    } else {
        replica.tokenizer().encode(&text, true)?
    };
    let prompt_tokens = prompt.len();
    let request = GenerateRequest {
        sampling: SamplingParams {
            temperature: if args.greedy { 0.0 } else { args.temperature },
            top_p: args.top_p,
            ..SamplingParams::default()
        },
        seed: args.seed,
        max_tokens: Some(args.max_tokens),
        ignore_eos: args.ignore_eos,
        ..GenerateRequest::new(fresh_request(), prompt)
    };
    let clock = clock();
    let start = clock();
    replica.generate(start, request)?;
    let mut report = RunReport {
        tokens: Vec::new(),
        text: String::new(),
        prompt_tokens,
        finish_reason: "stop",
        ttft_ms: 0.0,
        tokens_per_second: 0.0,
    };
    let mut first = None;
    drive(&mut replica, &clock, |event| {
        match event {
            Event::Token { sampled, text, .. } => {
                first.get_or_insert_with(&clock);
                report.tokens.push(sampled.token);
                show(&mut report.text, &text, args.json)?;
            }
            Event::Finished { reason, text, .. } => {
                show(&mut report.text, &text, args.json)?;
                if reason == FinishReason::Length {
                    report.finish_reason = "length";
                }
            }
            Event::Failed { error, .. } => bail!(error),
            _ => {}
        }
        Ok(())
    })?;
    let end = clock();
    let first = first.unwrap_or(end);
    report.ttft_ms = (first - start).as_secs_f64() * 1e3;
    let decode_s = (end - first).as_secs_f64();
    if report.tokens.len() > 1 && decode_s > 0.0 {
        report.tokens_per_second = (report.tokens.len() - 1) as f64 / decode_s;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!();
        eprintln!(
            "{} prompt tokens, first token after {:.0} ms, then {:.1} tokens/s",
            prompt_tokens, report.ttft_ms, report.tokens_per_second
        );
    }
    Ok(())
}

/// Steps until nothing is left to do.
fn drive(
    replica: &mut Replica,
    clock: &dyn Fn() -> Instant,
    mut each: impl FnMut(Event) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut events = Vec::new();
    while replica.has_work() {
        if replica.step(clock, &mut events).is_none() && events.is_empty() {
            bail!("the batcher has work but plans no step: please report this");
        }
        for (_, event) in events.drain(..) {
            each(event)?;
        }
    }
    Ok(())
}

fn show(whole: &mut String, text: &str, quiet: bool) -> anyhow::Result<()> {
    whole.push_str(text);
    if !quiet {
        let mut out = std::io::stdout();
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

#[derive(Debug, Serialize)]
struct EvalReport {
    perplexity: f64,
    ln_perplexity: f64,
    /// Standard error of ln_perplexity.
    standard_error: f64,
    tokens_scored: usize,
    windows: usize,
    window: usize,
}

/// Perplexity: the text is cut into windows, and the second half of each is scored given what comes
/// before it in the window.
pub fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {}", args.text.display()))?;
    let LoadedModel { mut replica, .. } = load_model(&args.model, &args.engine)?;
    let ids = replica.tokenizer().encode(&text, false)?;
    let bos = replica.tokenizer().bos();
    let window = args.window;
    if window < 4 || window > replica.tokens_max() {
        bail!("--window {window}: this model holds 4 to {} tokens", replica.tokens_max());
    }
    let windows = (ids.len() / window).min(args.chunks.unwrap_or(usize::MAX));
    if windows == 0 {
        bail!("{} has {} tokens: less than one window of {window}", args.text.display(), ids.len());
    }
    let clock = clock();
    let bar = LoadBar::counting("windows", windows as u64);
    let mut nll = Vec::new();
    for index in 0..windows {
        let mut tokens = ids[index * window..][..window].to_vec();
        if let Some(bos) = bos {
            tokens[0] = bos;
        }
        let request = ScoreRequest {
            request: fresh_request(),
            tenant: TenantId::local(),
            tokens,
            top: 0,
            priority: 0,
            deadline: None,
        };
        replica.score(clock(), request)?;
        drive(&mut replica, &clock, |event| {
            match event {
                Event::Scores { tokens } => {
                    let half = tokens.iter().skip(window / 2).flatten();
                    nll.extend(half.map(|s| f64::from(-s.logprob)));
                }
                Event::Failed { error, .. } => bail!(error),
                _ => {}
            }
            Ok(())
        })?;
        bar.set_position(index as u64 + 1);
    }
    bar.clear();
    let n = nll.len() as f64;
    let mean = nll.iter().sum::<f64>() / n;
    let variance = nll.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let report = EvalReport {
        perplexity: mean.exp(),
        ln_perplexity: mean,
        standard_error: (variance / n).sqrt(),
        tokens_scored: nll.len(),
        windows,
        window,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "perplexity {:.4} (ln {:.4} ± {:.4}) over {} tokens in {} windows of {window}",
            report.perplexity, mean, report.standard_error, report.tokens_scored, windows
        );
    }
    Ok(())
}

pub fn debug(command: &DebugCommand) -> anyhow::Result<()> {
    match command {
        DebugCommand::Logits(args) => logits(args),
        DebugCommand::Tokenize(args) => tokenize(args),
        DebugCommand::Detokenize(args) => detokenize(args),
        DebugCommand::Template(args) => template(args),
    }
}

fn logits(args: &LogitsArgs) -> anyhow::Result<()> {
    let OpenModel { source, .. } = ModelSpec::parse(&args.model)?.open()?;
    let blocks = args.tokens.len().div_ceil(cache::BLOCK_TOKENS_DEFAULT);
    let sizing = Sizing { kv_blocks: Some(blocks), profile: false };
    let (mut executor, _) = executor(source, &args.engine, sizing, &mut |_| {})?;
    let mut out = BufWriter::new(
        std::fs::File::create(&args.out)
            .with_context(|| format!("cannot write {}", args.out.display()))?,
    );
    let blocks: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
    for (index, chunk) in args.tokens.chunks(LOGITS_CHUNK).enumerate() {
        let plan = StepPlan {
            sequences: vec![SequenceStep {
                sequence: SequenceId(0),
                tokens: chunk.to_vec(),
                position: index * LOGITS_CHUNK,
                blocks: blocks.clone(),
                wanted: LogitsWanted::All,
            }],
        };
        for value in executor.step(&plan)?.logits(0) {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.flush().with_context(|| format!("cannot write {}", args.out.display()))
}

fn tokenize(args: &TokenizeArgs) -> anyhow::Result<()> {
    let OpenModel { tokenizer, .. } = ModelSpec::parse(&args.model)?.open()?;
    let input = read_text(&args.text)?;
    let texts = if args.lines {
        let parse = |line: &str| {
            serde_json::from_str(line).with_context(|| format!("{line:?} is not a JSON string"))
        };
        input.lines().map(parse).collect::<anyhow::Result<Vec<String>>>()?
    } else {
        vec![input]
    };
    for text in texts {
        let ids = tokenizer.encode(&text, args.add_special)?;
        if args.json {
            let pieces: Vec<_> =
                ids.iter().map(|&t| String::from_utf8_lossy(tokenizer.token_bytes(t))).collect();
            println!("{}", json!({ "tokens": ids, "pieces": pieces }));
        } else {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            println!("{}", ids.join(","));
        }
    }
    Ok(())
}

fn detokenize(args: &DetokenizeArgs) -> anyhow::Result<()> {
    let OpenModel { tokenizer, .. } = ModelSpec::parse(&args.model)?.open()?;
    print!("{}", tokenizer.decode(&args.tokens, !args.special));
    Ok(())
}

fn template(args: &TemplateArgs) -> anyhow::Result<()> {
    let OpenModel { tokenizer, template, .. } = ModelSpec::parse(&args.model)?.open()?;
    let value: Value =
        serde_json::from_str(&read_text(&args.messages)?).context("--messages is not JSON")?;
    let prompt = render(&tokenizer, &template, value)?;
    if args.tokens {
        let ids: Vec<String> = prompt.tokens.iter().map(ToString::to_string).collect();
        println!("{}", ids.join(","));
    } else {
        print!("{}", prompt.text);
    }
    Ok(())
}

/// Messages, tools and template variables as one JSON object (or the messages alone), rendered and
/// encoded.
pub fn render(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    value: Value,
) -> anyhow::Result<Prompt> {
    let mut variables = match value {
        Value::Object(fields) => fields,
        messages => serde_json::Map::from_iter([("messages".to_owned(), messages)]),
    };
    let mut list = |name: &str| match variables.remove(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => bail!("`{name}` must be a list"),
    };
    let (messages, tools, documents) = (list("messages")?, list("tools")?, list("documents")?);
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let input = ChatInput {
        messages: &messages,
        tools: &tools,
        documents: &documents,
        add_generation_prompt: true,
        variables: &variables,
        now: Calendar::from_unix_s(seconds.map_or(0, |s| s.as_secs() as i64)),
    };
    Ok(template.render(tokenizer, &input)?)
}

/// `-` is standard input.
fn read_text(argument: &str) -> anyhow::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    if std::io::stdin().is_terminal() {
        eprintln!("reading from the terminal until Ctrl-D");
    }
    std::io::stdin().read_to_string(&mut text).context("standard input is not UTF-8")?;
    Ok(text)
}

fn parse_ids(text: &str) -> anyhow::Result<Vec<TokenId>> {
    let id = |part: &str| {
        part.trim().parse().with_context(|| format!("{part:?} is not a token id; give 1,2,3"))
    };
    text.split(',').map(id).collect()
}

/// Requests of this process are told apart by a counter; nobody else sees them.
pub fn fresh_request() -> RequestId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let unique = NEXT.fetch_add(1, Ordering::Relaxed);
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = time.map_or(0, |t| t.as_nanos() as u64);
    RequestId(u128::from(nanos) << 64 | u128::from(unique))
}

/// Tokens of one step of `debug logits`: its rows are held in memory.
const LOGITS_CHUNK: usize = 64;
