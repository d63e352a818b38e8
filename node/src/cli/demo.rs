//! `vine demo`: a node with the built-in model, and a chat with it.

use super::args::{DemoArgs, EngineArgs};
use super::chat::Conversation;
use super::client::Client;
use super::up::{self, Served};
use anyhow::bail;
use serde_json::json;

pub async fn demo(args: &DemoArgs) -> anyhow::Result<()> {
    let served = Served { bar: !args.json, ..Served::new(args.api, vec!["demo".to_owned()]) };
    let node = up::serve(served, &EngineArgs::default()).await?;
    let url = node.url();
    if !args.json {
        println!("A node is up at {url} with the built-in model `demo`.\n");
    }
    let mut conversation = Conversation::greedy(Client::new(&url, None)?, "demo");
    let mut answers = Vec::new();
    for question in QUESTIONS {
        if !args.json {
            println!("you   {question}");
            print!("demo  ");
        }
        let answer = conversation.say(question, !args.json).await?;
        if !args.json {
            println!("\n");
        }
        answers.push(json!({ "question": question, "answer": answer }));
    }
    let empty = answers.iter().any(|a| a["answer"].as_str().is_none_or(|s| s.trim().is_empty()));
    if args.json {
        println!("{}", json!({ "url": url, "model": "demo", "chat": answers }));
    } else {
        println!("Ask it yourself:\n\n  vine chat --endpoint {url}\n");
        println!("  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\");
        println!(
            "    -d '{{\"model\":\"demo\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Tell me a story.\"}}]}}'\n"
        );
    }
    if args.once {
        node.shutdown().await;
        if empty {
            bail!("the model gave an empty answer");
        }
        return Ok(());
    }
    if !args.json {
        println!("Ctrl-C ends the node.");
    }
    Ok(node.run_until_signal().await?)
}

/// The sample chat.
const QUESTIONS: [&str; 3] =
    ["Hello!", "What is Grapevine?", "How do I start a node with my own model?"];
