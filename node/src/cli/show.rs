//! What `vine demo` shows of a mesh. Each part checks what it says, and fails if it does not hold.

use anyhow::{Context, bail, ensure};
use hyper::Method;
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, Instant};

use super::chat::Conversation;
use super::client::Client;
use super::fleet::{Fleet, FleetNode};
use super::peers;

/// Nodes of which one may die while another goes on: one that prefills and two that decode.
pub const NODES_TO_SURVIVE: usize = 3;

/// Shows the parts, one after the other.
pub struct Show {
    /// With text for people.
    pub aloud: bool,
}

impl Show {
    fn say(&self, text: &str) {
        if self.aloud {
            println!("{text}");
        }
    }

    fn title(&self, text: &str) {
        if self.aloud {
            println!("\n── {text} {}\n", "─".repeat(72usize.saturating_sub(text.chars().count())));
        }
    }

    /// The members.
    pub async fn mesh(&self, fleet: &Fleet) -> anyhow::Result<Value> {
        let peers = fleet.peers().await?;
        if self.aloud {
            println!("\n{}", peers::table(&peers));
        }
        for node in &fleet.nodes {
            self.say(&format!("  {} is {}", node.name, node.what()));
        }
        Ok(peers)
    }

    /// Has every node that decodes answer something, so that all know what it can do: until then the
    /// router only guesses, and may leave out a node that has not been measured.
    pub async fn warm_up(&self, fleet: &Fleet) -> anyhow::Result<()> {
        let client = Client::new(&fleet.nodes[0].url, None)?;
        for round in 0..WARM_UPS_MAX {
            let asked = (0..WARM_UP_REQUESTS).map(|request| {
                let content = format!("Hello number {round} {request}!");
                let body = json!({
                    "model": "demo", "temperature": 0, "max_tokens": 16,
                    "messages": [{ "role": "user", "content": content }],
                });
                let client = &client;
                async move { client.call(Method::POST, "/v1/chat/completions", Some(&body)).await }
            });
            futures_util::future::try_join_all(asked).await?;
            let counters = counters(fleet).await?;
            if counters[1..].iter().all(|of_node| of_node[STEP_TOKENS] > 0.0) {
                // Records of what nodes can do are told a few times a second.
                tokio::time::sleep(RECORDS_TOLD).await;
                return Ok(());
            }
        }
        bail!("some node was never asked: see vine explain")
    }

    /// A question at the first node, whoever answers it.
    pub async fn chat(&self, fleet: &Fleet, question: &str) -> anyhow::Result<Value> {
        let first = &fleet.nodes[0];
        self.title("any node answers");
        self.say(&format!("you   {question}   (at {}, {})", first.name, first.url));
        if self.aloud {
            print!("demo  ");
        }
        let mut conversation = Conversation::greedy(Client::new(&first.url, None)?, "demo");
        let answer = conversation.say(question, self.aloud).await?;
        self.say("");
        ensure!(!answer.trim().is_empty(), "the model gave an empty answer at {}", first.url);
        Ok(json!({ "url": first.url, "question": question, "answer": answer }))
    }

    /// A long prompt: the node that prefills computes it, another writes the answer. Gives the node that
    /// wrote.
    pub async fn hand_off(&self, fleet: &Fleet) -> anyhow::Result<(Value, usize)> {
        self.title("one node reads, another writes");
        self.say(&format!("A long prompt comes in at {}.", fleet.nodes[1].name));
        let asked = self.ask(fleet, 1, QUESTIONS[0]).await?;
        let Some(writer) = asked.writer else { bail!("no node got blocks from another") };
        let (prefiller, name) = (&fleet.nodes[0].name, &fleet.nodes[writer].name);
        self.say(&format!(
            "  {prefiller} computed {} of its {} tokens; {} KV blocks ({:.0} KiB) went to {name},\n  which \
             computed the last {} tokens and wrote the answer",
            asked.read,
            asked.tokens,
            asked.blocks,
            asked.bytes / 1024.0,
            asked.tokens - asked.blocks * BLOCK_TOKENS
        ));
        Ok((asked.json(fleet), writer))
    }

    /// The same beginning with other questions, until another node than `first` writes an answer: what is
    /// cached somewhere is not computed again.
    pub async fn prefix(&self, fleet: &mut Fleet, first: usize) -> anyhow::Result<Value> {
        self.title("what one node has read, every node knows");
        let decoders = fleet.nodes.len() - 1;
        for (turn, question) in QUESTIONS[1..].iter().enumerate() {
            let at = 1 + (first + turn) % decoders;
            let asked = self.ask(fleet, at, question).await?;
            let writer = asked.writer.unwrap_or(first);
            asked.check_prefix()?;
            if writer == first && decoders > 1 {
                continue;
            }
            self.say(&format!(
                "The same text with another question: {} has never seen it, and got it as KV blocks.\n  Of \
                 {} tokens, {} came out of another node's cache; {} computed {} of the rest.",
                fleet.nodes[writer].name,
                asked.tokens,
                asked.cached,
                fleet.nodes[0].name,
                asked.read
            ));
            return Ok(asked.json(fleet));
        }
        // The router sees no reason to ask another: then the one that it asks forgets what it has read.
        fleet.restart(first).await?;
        let asked = self.ask(fleet, first, QUESTIONS[0]).await?;
        asked.check_prefix()?;
        let Some(writer) = asked.writer else { bail!("no node got blocks from another") };
        self.say(&format!(
            "Other questions about the text came to {} again, so it was started anew, with an empty cache.\n  Of the \
             {} tokens of the next one, {} came as KV blocks out of the cache of {} to {}.",
            fleet.nodes[first].name,
            asked.tokens,
            asked.cached,
            fleet.nodes[0].name,
            fleet.nodes[writer].name
        ));
        Ok(asked.json(fleet))
    }

    /// Asks a question about the text, and looks at what the nodes did for it.
    async fn ask(&self, fleet: &Fleet, at: usize, question: &str) -> anyhow::Result<Asked> {
        let before = counters(fleet).await?;
        let usage = prompt(&fleet.nodes[at], question).await?;
        let after = counters(fleet).await?;
        let since = |index: usize, name: usize| after[index][name] - before[index][name];
        let writer = (1..fleet.nodes.len()).find(|&index| since(index, HAND_OFFS) > 0.0);
        let of_writer = |name| writer.map_or(0.0, |writer| since(writer, name));
        Ok(Asked {
            tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            cached: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
            read: since(0, STEP_TOKENS) as u64,
            blocks: of_writer(BLOCKS) as u64,
            bytes: of_writer(BYTES),
            writer,
        })
    }

    /// Kills the node that writes an answer, in the middle of it.
    pub async fn survival(&self, fleet: &mut Fleet) -> anyhow::Result<Value> {
        self.title("a node dies in the middle of a sentence");
        let undisturbed = self.story(fleet, None).await?.text;
        self.say(&format!("you   {STORY}   (at {})", fleet.nodes[0].name));
        if self.aloud {
            print!("demo  ");
        }
        let told = self.story(fleet, Some(undisturbed.chars().count() / 2)).await?;
        let killed =
            told.killed.context("the answer was complete before its node could be killed")?;
        ensure!(
            told.text == undisturbed,
            "the answer went on differently: {:?} instead of {undisturbed:?}",
            told.text
        );
        self.say(&format!(
            "\n\n  The answer is the one that an undisturbed node gives, character for character; the \
             longest pause\n  was {} ms.",
            told.pause.as_millis()
        ));
        let name = fleet.nodes[killed].name.clone();
        fleet.restart(killed).await?;
        self.say(&format!("  {name} is started again, and is a member at once."));
        Ok(
            json!({ "answer": told.text, "killed": name, "pause_ms": told.pause.as_millis() as u64 }),
        )
    }

    /// A streamed story at the first node. The one that writes it is killed after so many characters.
    async fn story(&self, fleet: &Fleet, kill_at: Option<usize>) -> anyhow::Result<Told> {
        let client = Client::new(&fleet.nodes[0].url, None)?;
        let body = json!({
            "model": "demo", "stream": true, "temperature": 0, "max_tokens": 220,
            "messages": [{ "role": "user", "content": STORY }],
        });
        let mut stream = client.stream("/v1/chat/completions", &body).await?;
        let mut told = Told::default();
        let mut last = Instant::now();
        while let Some(event) = stream.next().await? {
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            told.text.push_str(text);
            told.pause = told.pause.max(last.elapsed());
            last = Instant::now();
            if self.aloud && kill_at.is_some() {
                print!("{text}");
                std::io::stdout().flush()?;
            }
            if kill_at.is_some_and(|at| told.killed.is_none() && told.text.chars().count() >= at) {
                let Some(writer) = writer(fleet).await? else { continue };
                fleet.nodes[writer].kill();
                told.killed = Some(writer);
                if self.aloud {
                    print!(" ▍kill -9 {}▐ ", fleet.nodes[writer].name);
                }
            }
        }
        Ok(told)
    }
}

#[derive(Default)]
struct Told {
    text: String,
    killed: Option<usize>,
    /// The longest time between two events.
    pause: Duration,
}

/// A question and what the nodes did for it.
struct Asked {
    /// Of the prompt, and those that were cached somewhere.
    tokens: u64,
    cached: u64,
    /// In the steps of the node that prefills.
    read: u64,
    blocks: u64,
    bytes: f64,
    /// Who got blocks from another and wrote the answer.
    writer: Option<usize>,
}

impl Asked {
    /// The part that prompts share may not have been computed by anybody once more.
    fn check_prefix(&self) -> anyhow::Result<()> {
        ensure!(
            self.cached * 2 > self.tokens && self.read * 2 < self.tokens,
            "a prompt was computed again: {} of its {} tokens were cached, {} computed elsewhere",
            self.cached,
            self.tokens,
            self.read
        );
        Ok(())
    }

    fn json(&self, fleet: &Fleet) -> Value {
        json!({
            "prompt_tokens": self.tokens, "cached_tokens": self.cached, "computed_elsewhere": self.read,
            "blocks": self.blocks, "bytes": self.bytes,
            "writer": self.writer.map(|writer| fleet.nodes[writer].name.as_str()),
        })
    }
}

/// The counters of every node, in the order of [`COUNTERS`].
async fn counters(fleet: &Fleet) -> anyhow::Result<Vec<[f64; COUNTERS.len()]>> {
    let mut all = Vec::with_capacity(fleet.nodes.len());
    for node in &fleet.nodes {
        let text = metrics(node).await?;
        all.push(COUNTERS.map(|name| sum(&text, name)));
    }
    Ok(all)
}

async fn metrics(node: &FleetNode) -> anyhow::Result<String> {
    Client::new(&node.url, None)?.text("/metrics").await
}

/// The sum of the samples whose line begins so.
fn sum(metrics: &str, name: &str) -> f64 {
    let lines = metrics.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Asks a question about the text at a node; its usage.
async fn prompt(node: &FleetNode, question: &str) -> anyhow::Result<Value> {
    let body = json!({
        "model": "demo", "temperature": 0, "max_tokens": 24,
        "messages": [{ "role": "system", "content": TEXT }, { "role": "user", "content": question }],
    });
    let client = Client::new(&node.url, None)?;
    let answer = client.call(Method::POST, "/v1/chat/completions", Some(&body)).await?;
    Ok(answer["usage"].clone())
}

/// The node whose replica has a running sequence.
async fn writer(fleet: &Fleet) -> anyhow::Result<Option<usize>> {
    for (index, node) in fleet.nodes.iter().enumerate() {
        let text = metrics(node).await?;
        let running = text.lines().filter(|line| {
            line.starts_with("grapevine_sequences{") && line.contains("state=\"running\"")
        });
        if running.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
            > 0.0
        {
            if index == 0 {
                bail!("{} writes the answer, which is to read prompts", node.name);
            }
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// What the nodes are asked about: long enough for a dozen blocks.
const TEXT: &str = "You are the assistant of a small workshop. The workshop has three hosts: the first one \
stands under the stairs and reads what people send, the second one stands in the kitchen, and the third one \
stands in the attic beside the window. Each of them can answer, and none of them is in charge. When one of them \
is switched off, the others go on. People ask about the weather, about bread, about the garden, and now and then \
about the hosts themselves. Answer in one short and friendly sentence.";
const QUESTIONS: [&str; 7] = [
    "Where does the second host stand?",
    "What do people ask about?",
    "Who is in charge?",
    "Where does the first host stand?",
    "What happens when one is switched off?",
    "How many hosts are there?",
    "What does the first host do?",
];
const COUNTERS: [&str; 4] = [
    "grapevine_step_tokens_total",
    "grapevine_kv_hand_offs_total{outcome=\"complete\"}",
    "grapevine_kv_blocks_attached_total",
    "grapevine_kv_bytes_total{direction=\"in\"}",
];
const WARM_UPS_MAX: usize = 10;
const WARM_UP_REQUESTS: usize = 8;
const RECORDS_TOLD: Duration = Duration::from_millis(1_500);
const BLOCK_TOKENS: u64 = 16;
const STEP_TOKENS: usize = 0;
const HAND_OFFS: usize = 1;
const BLOCKS: usize = 2;
const BYTES: usize = 3;
const STORY: &str = "Tell me a short story about Mia.";
