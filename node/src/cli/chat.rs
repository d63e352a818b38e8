//! `vine chat` and `vine models`: a running node, seen from the terminal.

use super::args::{ChatArgs, EndpointArgs};
use super::client::Client;
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};

pub async fn models(args: &EndpointArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.endpoint, args.key.clone())?;
    if args.json {
        println!("{}", client.json("/v1/models").await?);
        return Ok(());
    }
    for model in client.models().await? {
        println!("{model}");
    }
    Ok(())
}

pub async fn chat(args: &ChatArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.endpoint.endpoint, args.endpoint.key.clone())?;
    let model = client.model(args.model.as_deref()).await?;
    let mut conversation = Conversation::new(client, model, args);
    if let Some(message) = &args.message {
        let answer = conversation.say(message, !args.endpoint.json).await?;
        match args.endpoint.json {
            true => println!("{}", json!({ "model": conversation.model, "content": answer })),
            false => println!(),
        }
        return Ok(());
    }
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        println!(
            "{} at {}. An empty line or Ctrl-D ends.",
            conversation.model, args.endpoint.endpoint
        );
    }
    loop {
        if interactive {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let Some(line) =
            tokio::task::spawn_blocking(|| std::io::stdin().lock().lines().next()).await?
        else {
            return Ok(());
        };
        let line = line?;
        if line.trim().is_empty() {
            return Ok(());
        }
        conversation.say(&line, true).await?;
        println!();
    }
}

/// A conversation that remembers what was said.
pub struct Conversation {
    client: Client,
    model: String,
    messages: Vec<Value>,
    temperature: Option<f32>,
    max_tokens: Option<usize>,
}

impl Conversation {
    fn new(client: Client, model: String, args: &ChatArgs) -> Self {
        let system = args.system.as_ref().map(|s| json!({ "role": "system", "content": s }));
        Conversation {
            client,
            model,
            messages: system.into_iter().collect(),
            temperature: args.temperature,
            max_tokens: args.max_tokens,
        }
    }

    /// A conversation with greedy answers.
    pub fn greedy(client: Client, model: &str) -> Self {
        Conversation {
            client,
            model: model.to_owned(),
            messages: Vec::new(),
            temperature: Some(0.0),
            max_tokens: None,
        }
    }

    /// Sends a message and gives the answer, written to the terminal as it comes if `show`.
    pub async fn say(&mut self, message: &str, show: bool) -> anyhow::Result<String> {
        self.messages.push(json!({ "role": "user", "content": message }));
        let mut body = json!({ "model": self.model, "messages": self.messages, "stream": true });
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(tokens) = self.max_tokens {
            body["max_completion_tokens"] = json!(tokens);
        }
        let mut stream = self.client.stream("/v1/chat/completions", &body).await?;
        let mut answer = String::new();
        while let Some(event) = stream.next().await? {
            let delta = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            if show {
                let mut out = std::io::stdout();
                out.write_all(delta.as_bytes())?;
                out.flush()?;
            }
            answer.push_str(delta);
        }
        self.messages.push(json!({ "role": "assistant", "content": answer }));
        Ok(answer)
    }
}
