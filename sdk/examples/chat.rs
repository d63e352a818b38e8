//! Streams an answer and survives the death of the nodes that send it.
//!
//! ```sh
//! vine demo --nodes 3 &
//! cargo run -p grapevine-sdk --example chat -- --endpoint http://127.0.0.1:8420 "Tell me a story."
//! ```

use std::io::Write;
use std::process::ExitCode;

use grapevine::{Client, Error, Request};

const USAGE: &str = "chat [--endpoint URL]... [--key KEY] [--model NAME] [--set FIELD=JSON]... \
                     [--take EVENTS | --whole] PROMPT";

struct Arguments {
    endpoints: Vec<String>,
    key: Option<String>,
    model: String,
    /// Fields of the request.
    fields: Vec<(String, serde_json::Value)>,
    /// The stream is let go after so many events.
    take: usize,
    /// All of the answer at its end, as JSON.
    whole: bool,
    prompt: String,
}

impl Arguments {
    fn read() -> Option<Arguments> {
        let mut arguments = Arguments {
            endpoints: Vec::new(),
            key: None,
            model: "demo".to_owned(),
            fields: Vec::new(),
            take: usize::MAX,
            whole: false,
            prompt: String::new(),
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--endpoint" => arguments.endpoints.push(words.next()?),
                "--key" => arguments.key = Some(words.next()?),
                "--model" => arguments.model = words.next()?,
                "--whole" => arguments.whole = true,
                "--take" => arguments.take = words.next()?.parse().ok()?,
                "--set" => {
                    let (field, json) =
                        words.next()?.split_once('=').map(|(f, j)| (f.to_owned(), j.to_owned()))?;
                    arguments.fields.push((field, serde_json::from_str(&json).ok()?));
                }
                _ => arguments.prompt = word,
            }
        }
        if arguments.endpoints.is_empty() {
            arguments.endpoints.push("http://127.0.0.1:8420".to_owned());
        }
        (!arguments.prompt.is_empty()).then_some(arguments)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let Some(arguments) = Arguments::read() else {
        eprintln!("usage: {USAGE}");
        return ExitCode::from(2);
    };
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                eprintln!("  because {error}");
                source = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<(), Error> {
    let client = Client::new(&arguments.endpoints, arguments.key.as_deref())?;
    // Calls learn by themselves where else the API is; this way it is known before the first one.
    client.refresh().await?;
    let request = Request::chat(&arguments.model).user(&arguments.prompt);
    let fields = arguments.fields.iter();
    let request = fields.fold(request, |request, (field, value)| request.set(field, value));

    if arguments.whole {
        let answer = client.chat(&request).await?;
        println!("{}", serde_json::to_string(&answer).expect("an answer was JSON"));
        return Ok(());
    }
    let mut answer = client.chat_stream(&request);
    let mut resumed = 0;
    for _ in 0..arguments.take {
        let Some(event) = answer.next().await.transpose()? else { break };
        if answer.resumed() > resumed {
            resumed = answer.resumed();
            eprintln!("went on elsewhere, {resumed}");
        }
        print!("{}", event.text());
        // Whoever reads may be gone: then there is nobody to write for.
        if std::io::stdout().flush().is_err() {
            break;
        }
        if let Some(usage) = event.usage() {
            eprintln!("{} tokens", usage.completion_tokens);
        }
    }
    println!();
    // Its connection closes, and the node stops computing.
    drop(answer);
    if arguments.take < usize::MAX {
        eprintln!("let go; ends with its input");
        let _ = tokio::task::spawn_blocking(|| std::io::stdin().lines().count()).await;
    }
    Ok(())
}
