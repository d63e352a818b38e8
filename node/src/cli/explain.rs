//! `vine explain`: why a request went where it went, for people who were not there.

use clap::Args;
use hyper::Method;
use protocol::api::{
    ExplainedCandidate, ExplainedChoice, ExplainedDecision, ExplainedNode, ExplainedOutcome,
    ExplainedPrefill, ExplainedReplica, Explanation,
};
use std::fmt::Write;

use super::mesh::{AskedNodeArgs, ask};
use super::table::Table;

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The request's id, which its answer has as `x-request-id`; or `latest`, for the last one.
    #[arg(value_name = "REQUEST", default_value = "latest")]
    pub request: String,
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

pub async fn explain(args: &ExplainArgs) -> anyhow::Result<()> {
    let is_id = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if !args.request.chars().all(is_id) {
        anyhow::bail!("{:?} is no request's id: it looks like req-0123…", args.request);
    }
    let path = format!("/admin/v1/requests/{}/explain", args.request);
    let answer = ask(&args.node, Method::GET, &path, None).await?;
    match args.node.json {
        true => println!("{answer}"),
        false => print!("{}", text(&serde_json::from_value(answer)?)),
    }
    Ok(())
}

/// The whole story.
pub fn text(explanation: &Explanation) -> String {
    let Explanation { request, node, decisions } = explanation;
    let mut out = format!("{request}, as {} decided it\n", name(node));
    for (n, ExplainedDecision { age_ms, what, outcome }) in decisions.iter().enumerate() {
        let ago = duration(*age_ms);
        let story = match what {
            ExplainedChoice::Replica(replica) => replica_story(n + 1, &ago, replica, outcome),
            ExplainedChoice::Prefill(prefill) => prefill_story(n + 1, &ago, prefill, outcome),
        };
        out.push('\n');
        out.push_str(&story);
    }
    out
}

fn replica_story(
    n: usize,
    ago: &str,
    decision: &ExplainedReplica,
    outcome: &ExplainedOutcome,
) -> String {
    let ExplainedReplica { model, prompt_tokens, output_tokens, .. } = decision;
    let mut out = format!(
        "{n}. Which replica of {model} answers, {ago} ago: prompt about {prompt_tokens} tokens, answer \
         about {output_tokens}\n   {}\n",
        reason(decision)
    );
    let all = decision.chosen.iter().chain(&decision.others);
    if let Some(chosen) = &decision.chosen {
        out.push('\n');
        out.push_str(&indented(&candidates(chosen, all.clone())));
    }
    let left_out = decision.others_total.saturating_sub(decision.others.len() as u64);
    if left_out > 0 {
        let _ = writeln!(out, "   and {left_out} more that were dearer");
    }
    for candidate in all {
        let cached = candidate.overlap_tokens;
        let peer = candidate.path_peer.as_ref().map(name).unwrap_or_default();
        let notes = [
            (cached > 0).then(|| {
                let below = below(candidate.below_tokens);
                format!("has {cached} tokens of the prompt cached{below}")
            }),
            (candidate.path == "fetch").then(|| format!("would fetch cached ones from {peer}")),
            (candidate.path == "remote").then(|| format!("would have {peer} compute the prompt")),
            (candidate.prefill_rate == 0).then(|| "its speed is a guess".to_owned()),
            (!candidate.against.is_empty()).then(|| {
                let against: Vec<&str> = candidate.against.iter().map(|a| objection(a)).collect();
                format!("is asked after others: {}", against.join(", "))
            }),
        ];
        let notes: Vec<String> = notes.into_iter().flatten().collect();
        if !notes.is_empty() {
            let _ = writeln!(out, "   {}: {}", name(&candidate.node), notes.join("; "));
        }
    }
    for node in &decision.unavailable {
        let _ = writeln!(out, "   {} could not be asked: {}", name(&node.node), node.why);
    }
    out.push_str(&outcome_lines(outcome, decision.chosen.as_ref()));
    out
}

fn reason(decision: &ExplainedReplica) -> String {
    let Some(chosen) = &decision.chosen else {
        return "nobody could be asked".to_owned();
    };
    let who = name(&chosen.node);
    let best = decision.others.first();
    match decision.why.as_str() {
        "only" => format!("{who}: no other could be asked"),
        "cheapest" => {
            let next = best.map_or(0.0, |best| best.score_ms - chosen.score_ms);
            let all = decision.others_total + 1;
            format!("{who}: the cheapest of {all}, by {} before the next", duration(next))
        }
        "explored" => {
            let extra = best.map_or(0.0, |best| chosen.score_ms - best.score_ms);
            format!("{who}: to learn how it does; the cheapest was cheaper by {}", duration(extra))
        }
        "last_resort" => format!("{who}: something speaks against each of those that are there"),
        other => format!("{who}: {other}"),
    }
}

/// What each was thought to cost, and what choosing it instead would have added.
fn candidates<'a>(
    chosen: &ExplainedCandidate,
    all: impl Iterator<Item = &'a ExplainedCandidate>,
) -> String {
    let mut table = Table::new(&[
        "node",
        "runs",
        "queue",
        "below",
        "kv",
        "prefill",
        "hop",
        "= first token",
        "+ gaps",
        "= cost",
        "instead",
    ]);
    for (place, candidate) in all.enumerate() {
        let more = candidate.score_ms - chosen.score_ms;
        let mark = if place == 0 { " <" } else { "" };
        table.row(&[
            format!("{}{mark}", name(&candidate.node)),
            (candidate.running + candidate.waiting).to_string(),
            duration(candidate.queue_ms),
            duration(candidate.raise_ms),
            duration(candidate.kv_ms),
            duration(candidate.prefill_ms),
            duration(candidate.hop_ms),
            duration(candidate.ttft_ms),
            duration(candidate.decode_ms),
            duration(candidate.score_ms),
            match place {
                0 => String::new(),
                _ if more < 0.0 => format!("-{}", duration(-more)),
                _ => format!("+{}", duration(more)),
            },
        ]);
    }
    table.to_string()
}

fn prefill_story(
    n: usize,
    ago: &str,
    plan: &ExplainedPrefill,
    outcome: &ExplainedOutcome,
) -> String {
    let ExplainedPrefill { mode, prompt_tokens, cached_tokens, .. } = plan;
    let asked: Vec<String> = plan.sources.iter().map(|source| name(&source.node)).collect();
    let choice = match (plan.choice.as_str(), asked.split_first()) {
        ("fetch", Some((first, _))) => format!("fetched from the cache of {first}"),
        ("remote", Some((first, _))) => format!("computed by {first}"),
        _ => "computed here".to_owned(),
    };
    let mut out = format!(
        "{n}. Where the prompt's keys and values come from, {ago} ago (--disagg {mode}): {choice}\n   \
         {cached_tokens} of {prompt_tokens} tokens were cached here{}\n",
        below(plan.below_tokens)
    );
    if asked.len() > 1 {
        let _ = writeln!(out, "   if that fails: {}, then here", asked[1..].join(", "));
    }
    let mut table = Table::new(&["way", "queue", "below", "prefill", "kv", "harm", "= cost"]);
    for option in &plan.options {
        let way = match (&option.peer, option.prefill) {
            (None, _) => "compute it here".to_owned(),
            (Some(peer), true) => format!("have {} compute it", name(peer)),
            (Some(peer), false) => format!("fetch what {} has", name(peer)),
        };
        table.row(&[
            way,
            duration(option.queue_ms),
            duration(option.raise_ms),
            duration(option.prefill_ms),
            duration(option.kv_ms),
            duration(option.harm_ms),
            duration(option.cost_ms),
        ]);
    }
    out.push('\n');
    out.push_str(&indented(&table.to_string()));
    if plan.passed_over > 0 {
        let _ = writeln!(out, "   {} more had nothing to give, or are not well", plan.passed_over);
    }
    out.push_str(&outcome_lines(outcome, None));
    out
}

fn outcome_lines(outcome: &ExplainedOutcome, chosen: Option<&ExplainedCandidate>) -> String {
    let mut parts = Vec::new();
    if let Some(ms) = outcome.first_token_ms {
        let thought = chosen.map(|c| format!(" (thought: {})", duration(c.ttft_ms)));
        let thought = thought.unwrap_or_default();
        parts.push(format!("first token after {}{thought}", duration(ms)));
    }
    match (outcome.ended_ms, outcome.end.as_deref()) {
        (Some(ms), Some("refused")) => parts.push(format!("refused after {}", duration(ms))),
        (Some(ms), Some("failed")) => parts.push(format!("failed after {}", duration(ms))),
        (Some(ms), _) => parts.push(format!("ended after {}", duration(ms))),
        (None, _) => parts.push("not over yet".to_owned()),
    }
    match outcome.regret_ms {
        Some(ms) if ms > 0.0 => {
            parts.push(format!("the best of the others would have saved about {}", duration(ms)));
        }
        Some(_) => parts.push("no other would have been better, as far as can be known".to_owned()),
        None => {}
    }
    format!("   {}\n", parts.join("; "))
}

fn objection(against: &str) -> &str {
    match against {
        "other_weights" => "it has other weights under this name",
        "suspected" => "it is suspected to be gone",
        "prefill_only" => "it is there for prefills",
        "overloaded" => "it has more to do than it can begin soon",
        other => other,
    }
}

fn name(node: &ExplainedNode) -> String {
    let short: String = node.id.chars().take(8).collect();
    let own = if node.this_node { "this node, " } else { "" };
    match &node.name {
        Some(name) => format!("{name} ({own}{short})"),
        None => format!("{own}{short}"),
    }
}

/// What part of cached tokens must be brought up first.
fn below(tokens: u64) -> String {
    match tokens {
        0 => String::new(),
        _ => format!(", {tokens} of them below the pool"),
    }
}

fn duration(ms: f64) -> String {
    match ms {
        _ if ms < 10.0 => format!("{ms:.1} ms"),
        _ if ms < 10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1e3),
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("   {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::api::ExplainedUnavailable;

    fn node(id: &str, name: &str, this_node: bool) -> ExplainedNode {
        ExplainedNode { id: id.repeat(8), name: Some(name.to_owned()), this_node }
    }

    fn candidate(node: ExplainedNode, queue_ms: f64) -> ExplainedCandidate {
        ExplainedCandidate {
            node,
            running: 2,
            waiting: 0,
            queue_tokens: 300,
            prefill_rate: 1000,
            decode_step_ms: 20.0,
            overlap_tokens: 0,
            below_tokens: 0,
            path: "recompute".to_owned(),
            path_peer: None,
            queue_ms,
            raise_ms: 0.0,
            kv_ms: 0.0,
            prefill_ms: 2000.0,
            hop_ms: 6.0,
            ttft_ms: 2006.0 + queue_ms,
            decode_ms: 32.0,
            score_ms: 2038.0 + queue_ms,
            against: Vec::new(),
        }
    }

    #[test]
    fn a_stranger_understands() {
        let mut chosen = candidate(node("a", "ada", true), 300.0);
        chosen.overlap_tokens = 512;
        chosen.below_tokens = 160;
        let mut other = candidate(node("b", "bob", false), 700.0);
        other.path = "fetch".to_owned();
        other.path_peer = Some(node("a", "ada", true));
        other.against = vec!["suspected".to_owned()];
        let carl = ExplainedUnavailable {
            node: node("c", "carl", false),
            why: "loads the model, or drains".to_owned(),
        };
        let replica = ExplainedReplica {
            model: "demo".to_owned(),
            prompt_tokens: 2000,
            output_tokens: 256,
            why: "cheapest".to_owned(),
            chosen: Some(chosen),
            others: vec![other],
            others_total: 4,
            unavailable: vec![carl],
        };
        let outcome = ExplainedOutcome {
            first_token_ms: Some(2250.0),
            ended_ms: Some(12_345.0),
            end: Some("done".to_owned()),
            regret_ms: Some(0.0),
            ..ExplainedOutcome::default()
        };
        let what = ExplainedChoice::Replica(Box::new(replica));
        let decision = ExplainedDecision { age_ms: 15_000.0, what, outcome };
        let explanation = Explanation {
            request: "req-7".to_owned(),
            node: node("a", "ada", true),
            decisions: vec![decision],
        };
        let read = serde_json::to_string(&explanation).unwrap();
        assert_eq!(serde_json::from_str::<Explanation>(&read).unwrap(), explanation);
        let expect = "\
req-7, as ada (this node, aaaaaaaa) decided it

1. Which replica of demo answers, 15.0 s ago: prompt about 2000 tokens, answer about 256
   ada (this node, aaaaaaaa): the cheapest of 5, by 400 ms before the next

   node                         runs   queue   below      kv  prefill     hop  = first token  + gaps   = cost  instead
   ada (this node, aaaaaaaa) <     2  300 ms  0.0 ms  0.0 ms  2000 ms  6.0 ms        2306 ms   32 ms  2338 ms
   bob (bbbbbbbb)                  2  700 ms  0.0 ms  0.0 ms  2000 ms  6.0 ms        2706 ms   32 ms  2738 ms  +400 ms
   and 3 more that were dearer
   ada (this node, aaaaaaaa): has 512 tokens of the prompt cached, 160 of them below the pool
   bob (bbbbbbbb): would fetch cached ones from ada (this node, aaaaaaaa); is asked after others: it is suspected to be gone
   carl (cccccccc) could not be asked: loads the model, or drains
   first token after 2250 ms (thought: 2306 ms); ended after 12.3 s; no other would have been better, as far as can be known
";
        assert_eq!(text(&explanation), expect);
    }
}
