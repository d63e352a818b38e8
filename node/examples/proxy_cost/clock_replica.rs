//! A node whose replica says the time.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use engine::replica::{Event, Events, FinishReason, RequestError};
use engine::sampler::SampledToken;
use node::mesh::{Mesh, MeshOptions, Roster};
use node::replica::{Core, Stats, StepReport, Work};
use node::{Loaded, ModelOptions, NodeOptions};
use protocol::identity::{Invite, Roles};
use protocol::{Instant, RequestId};

use crate::byte_tokenizer::byte_tokenizer;

/// Runs a node until the standard input ends; without a token one that has the model. Prints the API's
/// address and a token.
#[tokio::main]
pub async fn run_node(gap: Duration, join: Option<&str>) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let roster = Roster::new();
    let loopback = "127.0.0.1:0".parse()?;
    let token = join.map(str::parse::<Invite>).transpose().context("the token")?;
    let is_entrance = token.is_some();
    let options =
        MeshOptions { service: roster.clone(), token, ..MeshOptions::new(data.path(), loopback) };
    let mesh = Mesh::start(options).await?;
    let models = match is_entrance {
        true => Vec::new(),
        false => vec![ModelOptions {
            id: "m".to_owned(),
            loader: Box::new(move |_| Ok(clock_model(gap))),
        }],
    };
    let mut options = NodeOptions::new(loopback, models);
    options.without_models = true;
    let node = node::serve(options).await?;
    node.join(mesh.clone(), roster, data.path())?;
    node.ready().await?;
    let grant = (Roles::ALL, 1, 3600);
    let invite = match is_entrance {
        true => "-".to_owned(),
        false => mesh.identity().invite(grant, vec![mesh.address()])?.to_string(),
    };
    println!("{} {invite}", node.address());
    std::io::stdout().flush()?;
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    Ok(())
}

fn clock_model(gap: Duration) -> Loaded {
    Loaded {
        tokenizer: byte_tokenizer(),
        template: None,
        vocab: VOCAB,
        hidden: 1,
        context_tokens_max: 1 << 20,
        fingerprint: "fp_clock".to_owned(),
        kv_bytes_per_token: 0,
        namer: None,
        core: Box::new(Clock { gap, running: BTreeMap::new() }),
    }
}

/// Gives each request a token in each step: the time at which the step ended.
struct Clock {
    gap: Duration,
    /// Tokens said, and tokens to say.
    running: BTreeMap<RequestId, (usize, usize)>,
}

impl Core for Clock {
    fn submit(&mut self, _now: Instant, work: Work) -> Result<Vec<Event>, RequestError> {
        if let Work::Generate(request) = work {
            self.running.insert(request.request, (0, request.max_tokens.unwrap_or(1)));
        }
        Ok(Vec::new())
    }

    fn cancel(&mut self, _now: Instant, request: RequestId) {
        self.running.remove(&request);
    }

    fn step(&mut self, _clock: &dyn Fn() -> Instant, events: &mut Events) -> StepReport {
        thread::sleep(self.gap);
        let tokens = self.running.len();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let text = format!("{} ", now.as_nanos());
        self.running.retain(|&request, (said, wanted)| {
            if *said == 0 {
                events.push((request, Event::Started { choice: 0, cached_tokens: 0 }));
            }
            let sampled = SampledToken { token: 3, logprob: 0.0, top: Vec::new() };
            let index = *said as u64;
            let token = Event::Token { choice: 0, index, sampled, text: text.clone() };
            events.push((request, token));
            *said += 1;
            if said == wanted {
                let (reason, generated) = (FinishReason::Length, *said);
                let text = String::new();
                events.push((request, Event::Finished { choice: 0, reason, text, generated }));
            }
            said != wanted
        });
        StepReport { tokens }
    }

    fn stats(&self) -> Stats {
        Stats { running: self.running.len(), ..Stats::default() }
    }
}

const VOCAB: usize = 259;
