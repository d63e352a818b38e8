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
    talk(&mut conversation, &args.endpoint.endpoint).await
}

/// One message for each line of the standard input, until it ends.
async fn talk(conversation: &mut Conversation, endpoint: &str) -> anyhow::Result<()> {
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        println!(
            "{} at {endpoint}. Ctrl-C stops an answer, Ctrl-D ends the chat.",
            conversation.model
        );
    }
    let mut lines = input_lines();
    loop {
        if interactive {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                None
            }
        };
        let Some(line) = line.transpose()? else {
            if interactive {
                println!();
            }
            return Ok(());
        };
        if line.trim().is_empty() {
            continue;
        }
        match conversation.say(&line, true).await {
            Ok(_) => println!(),
            // One failed answer must not cost the conversation.
            Err(error) if interactive => eprintln!("\n{error:#}"),
            Err(error) => return Err(error),
        }
    }
}

/// Lines as they are typed. A thread of its own: a read of the terminal cannot be taken back.
fn input_lines() -> tokio::sync::mpsc::Receiver<std::io::Result<String>> {
    let (lines, receiver) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
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

    /// Sends a message and gives the answer, written to the terminal as it comes if `show`; then
    /// Ctrl-C stops it, and what was said until then is the answer. After an error it is as if the
    /// message had not been sent.
    pub async fn say(&mut self, message: &str, show: bool) -> anyhow::Result<String> {
        self.messages.push(json!({ "role": "user", "content": message }));
        match self.answer(show).await {
            Ok(answer) => {
                self.messages.push(json!({ "role": "assistant", "content": answer }));
                Ok(answer)
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    async fn answer(&self, show: bool) -> anyhow::Result<String> {
        let mut body = json!({ "model": self.model, "messages": self.messages, "stream": true });
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(tokens) = self.max_tokens {
            body["max_completion_tokens"] = json!(tokens);
        }
        let mut answer = String::new();
        let receive = async {
            let mut stream = self.client.stream("/v1/chat/completions", &body).await?;
            while let Some(event) = stream.next().await? {
                let delta = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
                if show {
                    let mut out = std::io::stdout();
                    out.write_all(delta.as_bytes())?;
                    out.flush()?;
                }
                answer.push_str(delta);
            }
            anyhow::Ok(())
        };
        tokio::select! {
            received = receive => received?,
            interrupted = tokio::signal::ctrl_c(), if show => interrupted?,
        }
        Ok(answer)
    }
}
