//! `vine demo`: nodes with the built-in model on this host, and what a mesh of them can do.

use super::args::{DemoArgs, EngineArgs};
use super::chat::Conversation;
use super::client::Client;
use super::fleet::{Fleet, ROLES};
use super::show::{self, Show};
use super::up::{self, Served};
use anyhow::bail;
use serde_json::json;

pub async fn demo(args: &DemoArgs) -> anyhow::Result<()> {
    match args.nodes {
        1 => alone(args).await,
        _ => mesh(args).await,
    }
}

async fn alone(args: &DemoArgs) -> anyhow::Result<()> {
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
        print_invitation(&url);
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

/// Several nodes, and what they do for each other.
async fn mesh(args: &DemoArgs) -> anyhow::Result<()> {
    if !args.json {
        println!("Starting {} nodes on this host and joining them by token …", args.nodes);
    }
    let mut fleet = tokio::select! {
        fleet = Fleet::start(args.api, args.nodes, ROLES) => fleet?,
        stopped = node::shutdown_signal() => return Ok(stopped?),
    };
    // Whether the nodes stay; a signal ends the show, too.
    let stay = tokio::select! {
        shown = show(args, &mut fleet) => shown.map(|()| !args.once),
        stopped = node::shutdown_signal() => stopped.map(|()| false).map_err(Into::into),
    };
    let ended = match stay {
        Ok(true) => tokio::select! {
            ended = fleet.any_end() => ended,
            stopped = node::shutdown_signal() => stopped.map_err(Into::into),
        },
        stay => stay.map(|_| ()),
    };
    fleet.stop().await;
    ended
}

async fn show(args: &DemoArgs, fleet: &mut Fleet) -> anyhow::Result<()> {
    let show = Show { aloud: !args.json };
    let peers = show.mesh(fleet).await?;
    show.warm_up(fleet).await?;
    let chat = show.chat(fleet, QUESTIONS[1]).await?;
    let (hand_off, writer) = show.hand_off(fleet).await?;
    let prefix = show.prefix(fleet, writer).await?;
    let survival = match fleet.nodes.len() {
        show::NODES_TO_SURVIVE.. => Some(show.survival(fleet).await?),
        _ => None,
    };
    let first = &fleet.nodes[0];
    if args.json {
        let seen = json!({
            "model": "demo", "peers": peers["peers"], "chat": chat, "hand_off": hand_off,
            "prefix": prefix, "survival": survival,
        });
        println!("{seen}");
    } else if !args.once {
        print_invitation(&first.url);
        println!("  vine peers --watch --data {}\n", first.data().display());
        println!("Ctrl-C ends the nodes.");
    }
    Ok(())
}

fn print_invitation(url: &str) {
    println!("Ask it yourself:\n\n  vine chat --endpoint {url}\n");
    println!("  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\");
    println!(
        "    -d '{{\"model\":\"demo\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Tell me a story.\"}}]}}'\n"
    );
}

/// The sample chat.
const QUESTIONS: [&str; 3] =
    ["Hello!", "What is Grapevine?", "How do I start a node with my own model?"];
