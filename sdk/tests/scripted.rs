//! The client against servers that do what a script says: cut, stall, garble, refuse.
//!
//! Servers listen on free loopback ports; a test reads what they were asked.

mod server;

use std::time::{Duration, Instant};

use grapevine::api::ErrorCode;
use grapevine::{Client, ClientOptions, Error, Request};
use server::{Asked, Reply, Server};

/// What the scripted node says: one event for each word.
const WORDS: [&str; 5] = ["Grape", "vines ", "cl\u{ef}mb ", "\u{1f347} ", "walls."];
const REQUEST: &str = "req-000000000000000000000000deadb000";

fn text() -> String {
    WORDS.concat()
}

fn event(number: usize, data: &str) -> String {
    format!("id: {REQUEST}:{number}\ndata: {data}\n\n")
}

fn chunk(delta: &str, finish: &str, usage: &str) -> String {
    let choices = match usage {
        "" => {
            format!(r#"[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]"#)
        }
        _ => "[]".to_owned(),
    };
    let head = r#""id":"c","object":"chat.completion.chunk","created":1,"model":"m""#;
    format!(r#"{{{head},"system_fingerprint":"f","choices":{choices}{usage}}}"#)
}

/// The events of a whole answer from this one on.
fn events(from: usize) -> String {
    let mut all = vec![chunk(r#"{"role":"assistant","content":""}"#, "null", "")];
    all.extend(WORDS.iter().map(|word| chunk(&format!(r#"{{"content":"{word}"}}"#), "null", "")));
    all.push(chunk("{}", r#""stop""#, ""));
    let usage = r#","usage":{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6}"#;
    all.push(chunk("{}", "null", usage));
    all.push("[DONE]".to_owned());
    all.iter().enumerate().skip(from).map(|(number, data)| event(number, data)).collect()
}

/// The beginning of a whole answer.
fn part(bytes: usize) -> Vec<u8> {
    server::stream_of(&events(0).as_bytes()[..bytes])
}

/// The number of the last event that the client has seen.
fn seen(asked: &Asked) -> Option<usize> {
    asked.header("last-event-id")?.rsplit_once(':')?.1.parse().ok()
}

/// What a node that can go on answers: the events after the last that was seen.
fn resume(asked: &Asked) -> Vec<u8> {
    server::stream(&events(seen(asked).map_or(0, |seen| seen + 1)))
}

fn error_event(code: &str) -> String {
    format!("event: error\ndata: {}\n\n", error_body(code, "null"))
}

fn error_body(code: &str, param: &str) -> String {
    format!(r#"{{"error":{{"message":"it says why","type":"t","param":{param},"code":"{code}"}}}}"#)
}

fn options() -> ClientOptions {
    let deadline = Duration::from_secs(60);
    ClientOptions { deadline, refresh_after: None, ..ClientOptions::default() }
}

/// Impatient.
fn quick(probe_after_ms: u64, silence_max_ms: u64) -> ClientOptions {
    ClientOptions {
        probe_after: Duration::from_millis(probe_after_ms),
        silence_max: Duration::from_millis(silence_max_ms),
        ..options()
    }
}

fn client(servers: &[&Server]) -> Client {
    let urls = servers.iter().map(|server| server.url());
    Client::with_options(urls, Some("sk-test"), options()).unwrap()
}

fn ask() -> Request<grapevine::Chat> {
    Request::chat("m").user("hi")
}

/// The text, how often the stream went on elsewhere, and the error at its end.
async fn read(client: &Client) -> (String, u32, Option<Error>) {
    let (mut answer, mut text, mut next) = (client.chat_stream(&ask()), String::new(), 0);
    while let Some(event) = answer.next().await {
        match event {
            Ok(event) => {
                assert_eq!(event.id.number, next, "each event once, in order");
                next += 1;
                text += event.text();
            }
            Err(error) => {
                assert!(answer.next().await.is_none(), "nothing follows an error");
                return (text, answer.resumed(), Some(error));
            }
        }
    }
    assert!(answer.next().await.is_none(), "nothing follows the end");
    (text, answer.resumed(), None)
}

#[tokio::test]
async fn an_undisturbed_answer() {
    let server = Server::start(|asked| Reply::Close(resume(asked))).await;
    let client = client(&[&server]);
    assert!(matches!(read(&client).await, (got, 0, None) if got == text()));
    let whole = client.chat(&ask()).await.unwrap();
    assert_eq!(whole.choices[0].message.content.as_deref(), Some(text().as_str()));
    assert_eq!(whole.usage.completion_tokens, 5);
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].header("authorization"), Some("Bearer sk-test"));
    assert_eq!(asked[0].header("content-type"), Some("application/json"));
    let left: u64 = asked[0].header("x-request-timeout-ms").unwrap().parse().unwrap();
    assert!((50_000..=60_000).contains(&left), "{left}");
    assert!(asked[0].body.contains(r#""include_usage":true"#), "{}", asked[0].body);
}

#[tokio::test]
async fn a_cut_after_every_byte() {
    let whole = server::stream(&events(0));
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let mut resumed = 0;
    for cut in 0..whole.len() {
        let part = whole[..cut].to_vec();
        let a = Server::start(move |_| Reply::Close(part.clone())).await;
        let (got, times, error) = read(&client(&[&a, &b])).await;
        assert!(error.is_none(), "cut after {cut}: {error:?}");
        assert_eq!(got, text(), "cut after {cut}");
        resumed += times;
    }
    assert!(resumed as usize > whole.len() / 2, "{resumed} of {}", whole.len());
    // The same in chunked coding, where the cut itself is an error of the connection.
    for cut in (0..whole.len()).step_by(7) {
        let part = server::chunked(&events(0), 5);
        let part = part[..cut.min(part.len())].to_vec();
        let a = Server::start(move |_| Reply::Close(part.clone())).await;
        let (got, _, error) = read(&client(&[&a, &b])).await;
        assert!(error.is_none() && got == text(), "chunked, cut after {cut}: {error:?} {got:?}");
    }
}

#[tokio::test]
async fn a_garbled_byte_everywhere() {
    let whole = events(0);
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let values = [0, b'\n', b'\r', b':', b'"', b'}', b'0', b'9', b' ', 0xff];
    // A request under another name goes on nowhere: `a_stream_that_nobody_knows_is_lost`.
    let name = 4..4 + REQUEST.len();
    let (mut right, mut tried) = (0, 0);
    for at in (0..whole.len()).filter(|at| !name.contains(at)) {
        let mut body = whole.clone().into_bytes();
        // Another value at each place; over all places each kind of place meets each value.
        body[at] = values[at % values.len()];
        let a = Server::start(move |_| Reply::Close(server::stream_of(&body))).await;
        // `read` checks the order of events. What it cannot see is a letter for a letter.
        let (got, _, error) = read(&client(&[&a, &b])).await;
        assert!(error.is_none(), "byte {at}: {error:?}");
        right += usize::from(got == text());
        tried += 1;
    }
    assert!(right > tried * 8 / 10, "{right} of {tried} texts are whole");
}

#[tokio::test]
async fn silence_in_the_middle() {
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let half = server::stream(&events(0));
    let half = half[..half.len() / 2].to_vec();
    // One that still answers for its health is left at the limit, one that does not after a probe.
    for (health, options) in [(true, quick(100, 500)), (false, quick(100, 30_000))] {
        let half = half.clone();
        let a = Server::start(move |asked| match asked.path.as_str() {
            "/healthz" if health => Reply::Close(server::json(200, "{}")),
            "/healthz" => Reply::Hold(Vec::new()),
            _ => Reply::Hold(half.clone()),
        })
        .await;
        let begun = Instant::now();
        let client = Client::with_options([a.url(), b.url()], None, options).unwrap();
        let (got, resumed, error) = read(&client).await;
        let took = begun.elapsed();
        assert!(error.is_none() && got == text() && resumed == 1, "{error:?} {got:?}");
        let enough = if health { Duration::from_millis(500) } else { Duration::from_millis(200) };
        assert!(took >= enough && took < Duration::from_secs(15), "health {health}: {took:?}");
        assert!(a.closed().await, "the silent connection is closed");
    }
}

#[tokio::test]
async fn before_the_first_event_the_next_is_asked() {
    let good = Server::start(|asked| Reply::Close(resume(asked))).await;
    let dead = Server::start(|_| Reply::Close(Vec::new())).await;
    let url = dead.url();
    drop(dead);
    let busy = |status| {
        Server::start(move |_| {
            let body = error_body("overloaded", "null");
            Reply::Close(server::json_with(status, "retry-after: 30\r\n", &body))
        })
    };
    let (full, loading) = (busy(429).await, busy(503).await);
    let failing = Server::start(|_| Reply::Close(server::json(500, "<html>"))).await;
    let silent = Server::start(|_| Reply::Hold(Vec::new())).await;
    let urls = [url, full.url(), loading.url(), failing.url(), silent.url(), good.url()];
    let client = Client::with_options(&urls, None, quick(300, 30_000)).unwrap();
    let (got, resumed, error) = read(&client).await;
    assert!(error.is_none() && got == text() && resumed == 0, "{error:?} {got:?}");
    assert!(good.asked()[0].header("authorization").is_none());
    // The one that answered is asked again, the others are left alone.
    assert_eq!(client.endpoints()[0], good.url());
    read(&client).await;
    assert_eq!((good.asked().len(), full.asked().len(), failing.asked().len()), (2, 1, 1));
}

#[tokio::test]
async fn what_is_refused_is_not_asked_again() {
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    for (status, code) in
        [(400, "invalid_value"), (401, "invalid_api_key"), (404, "model_not_found")]
    {
        let body = error_body(code, "\"messages\"");
        let a = Server::start(move |_| Reply::Close(server::json(status, &body))).await;
        let (_, _, error) = read(&client(&[&a, &b])).await;
        let Some(Error::Refused(refusal)) = error else { panic!("{error:?}") };
        assert_eq!((refusal.status, refusal.code.unwrap().as_str()), (status, code));
        assert_eq!(
            (refusal.param.as_deref(), refusal.message.as_str()),
            (Some("messages"), "it says why")
        );
        assert_eq!((a.asked().len(), b.asked().len()), (1, 0));
    }
    // An answer that is none.
    for reply in [server::json(200, "{}"), server::json(418, "teapot")] {
        let a = Server::start(move |_| Reply::Close(reply.clone())).await;
        let (_, _, error) = read(&client(&[&a, &b])).await;
        assert!(matches!(error, Some(Error::Malformed { .. } | Error::Refused(_))), "{error:?}");
        assert_eq!(b.asked().len(), 0);
    }
}

#[tokio::test]
async fn errors_within_a_stream() {
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let half: String = events(0).split_inclusive("\n\n").take(3).collect();
    for (code, goes_on) in [
        ("shutting_down", true),
        ("node_lost", true),
        ("deadline_exceeded", false),
        ("internal_error", false),
        ("a_code_of_tomorrow", false),
    ] {
        let body = server::stream(&format!("{half}{}", error_event(code)));
        let a = Server::start(move |_| Reply::Close(body.clone())).await;
        let (got, resumed, error) = read(&client(&[&a, &b])).await;
        match goes_on {
            true => assert!(error.is_none() && got == text() && resumed == 1, "{code}: {error:?}"),
            false => {
                let Some(Error::BrokeOff(refusal)) = error else { panic!("{code}: {error:?}") };
                assert_eq!(
                    refusal.code.map(ErrorCode::as_str),
                    Some(code).filter(|c| !c.contains("tomorrow"))
                );
                assert_eq!((got, refusal.message.as_str()), (WORDS[..2].concat(), "it says why"));
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_nobody_knows_is_lost() {
    let answer = |asked: &Asked| match asked.header("last-event-id") {
        Some(_) => server::json(404, &error_body("not_found", "\"last-event-id\"")),
        None => part(500),
    };
    let a = Server::start(move |asked| Reply::Close(answer(asked))).await;
    let b = Server::start(move |asked| Reply::Close(answer(asked))).await;
    let (got, _, error) = read(&client(&[&a, &b])).await;
    let Some(Error::Lost { last }) = error else { panic!("{error:?}") };
    assert!(text().starts_with(&got) && last.to_string().starts_with(REQUEST), "{got:?}");
    assert_eq!((a.asked().len(), b.asked().len()), (2, 1), "each was asked once for it");

    // Events without ids are none of a node's.
    let plain = |line: &&str| !line.starts_with("id:");
    let plain: String = events(0).lines().filter(plain).map(|line| format!("{line}\n")).collect();
    let a = Server::start(move |_| Reply::Close(server::stream(&plain))).await;
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let (got, resumed, error) = read(&client(&[&a, &b])).await;
    assert!(error.is_none() && got == text() && resumed == 0, "{error:?} {got:?}");
}

#[tokio::test]
async fn what_comes_twice_is_dropped_and_a_gap_is_no_answer() {
    let half = part(700);
    let a = Server::start(move |_| Reply::Close(half.clone())).await;
    // This one begins two events too early.
    let b = Server::start(|asked| {
        let seen = seen(asked).expect("a client that comes back");
        Reply::Close(server::stream(&events(seen.saturating_sub(1))))
    })
    .await;
    let (got, resumed, error) = read(&client(&[&a, &b])).await;
    assert!(error.is_none() && got == text() && resumed == 1, "{error:?} {got:?}");
    // This one always leaves one out.
    let c = Server::start(|asked| {
        Reply::Close(server::stream(&events(seen(asked).map_or(0, |seen| seen + 2))))
    })
    .await;
    let options = ClientOptions { attempts_max: 3, ..options() };
    let client = Client::with_options([a.url(), c.url()], None, options).unwrap();
    let (got, _, error) = read(&client).await;
    let Some(Error::Exhausted { attempts: 3, .. }) = error else { panic!("{error:?}") };
    assert!(text().starts_with(&got) && got != text());
}

#[tokio::test]
async fn attempts_and_time_are_bounded() {
    let failing = Server::start(|_| Reply::Close(Vec::new())).await;
    let options = ClientOptions { attempts_max: 4, ..options() };
    let client = Client::with_options([failing.url()], None, options.clone()).unwrap();
    let (_, _, error) = read(&client).await;
    let Some(Error::Exhausted { attempts: 4, last }) = error else { panic!("{error:?}") };
    assert!(matches!(*last, Error::Connection { .. }), "{last:?}");
    assert_eq!(failing.asked().len(), 4);

    // A node that asks to come back after the deadline is not waited for.
    let busy = Server::start(|_| {
        let body = error_body("rate_limit_exceeded", "null");
        Reply::Close(server::json_with(429, "retry-after: 40\r\n", &body))
    })
    .await;
    let begun = Instant::now();
    let in_time = ClientOptions { deadline: Duration::from_secs(20), ..options.clone() };
    let client = Client::with_options([busy.url()], None, in_time).unwrap();
    let (_, _, error) = read(&client).await;
    let error = error.expect("an error");
    assert!(matches!(error, Error::Deadline { .. }), "{error:?}");
    assert_eq!(error.code(), Some(ErrorCode::RateLimitExceeded));
    assert_eq!(error.refusal().unwrap().retry_after, Some(Duration::from_secs(40)));
    assert!(begun.elapsed() < Duration::from_secs(5));

    // A stream that lives and never ends.
    let endless = Server::start(|asked| match asked.path.as_str() {
        "/healthz" => Reply::Close(server::json(200, "{}")),
        _ => Reply::Hold(part(300)),
    })
    .await;
    let short = ClientOptions { deadline: Duration::from_millis(300), ..options };
    let client = Client::with_options([endless.url()], None, short).unwrap();
    let (_, _, error) = read(&client).await;
    assert!(matches!(error, Some(Error::Deadline { .. })), "{error:?}");
    assert!(endless.closed().await);
}

#[tokio::test]
async fn letting_go_closes_the_connection() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/healthz" => Reply::Close(server::json(200, "{}")),
        "/v1/completions" => Reply::Hold(Vec::new()),
        _ => Reply::Hold(part(300)),
    })
    .await;
    let client = client(&[&server]);
    // In the middle of an answer.
    let mut answer = client.chat_stream(&ask());
    answer.next().await.unwrap().unwrap();
    drop(answer);
    assert!(server.closed().await, "after an event");
    // Before the answer's head.
    let request = Request::completion("m", "hi");
    let mut answer = client.complete_stream(&request);
    let early = tokio::time::timeout(Duration::from_millis(50), answer.next()).await;
    assert!(early.is_err() && server.asked().len() == 2, "it waits");
    drop(answer);
    assert!(server.closed().await, "before the head");
}

#[tokio::test]
async fn endpoints_are_learnt_and_used() {
    let b = Server::start(|asked| Reply::Close(resume(asked))).await;
    let to_b = b.url();
    let list = move || {
        let node = |node: &str, url: &str| {
            format!(r#"{{"object":"endpoint","node":"{node}","name":"","urls":["{url}/v1"]}}"#)
        };
        format!(r#"{{"object":"list","node":"a","data":[{}]}}"#, node("b", &to_b))
    };
    let a = Server::start(move |asked| match asked.path.as_str() {
        "/v1/endpoints" => Reply::Close(server::json(200, &list())),
        _ => Reply::Close(part(400)),
    })
    .await;
    let options = ClientOptions { refresh_after: Some(Duration::from_secs(10)), ..options() };
    let client = Client::with_options([a.url()], Some("sk-test"), options).unwrap();
    let (got, resumed, error) = read(&client).await;
    assert!(error.is_none() && got == text() && resumed == 1, "{error:?} {got:?}");
    assert_eq!(client.endpoints(), [b.url(), a.url()]);
    let asked = a.asked().into_iter().find(|asked| asked.path == "/v1/endpoints").unwrap();
    assert_eq!(asked.header("authorization"), Some("Bearer sk-test"));
    // And not again for each call.
    for _ in 0..5 {
        read(&client).await;
    }
    let questions =
        |server: &Server| server.asked().iter().filter(|a| a.path == "/v1/endpoints").count();
    assert!(questions(&a) + questions(&b) <= 3, "{} {}", questions(&a), questions(&b));
}

#[tokio::test]
async fn models_and_embeddings() {
    let model = r#"{"id":"m","object":"model","created":1,"owned_by":"grapevine"}"#;
    let models = format!(r#"{{"object":"list","data":[{model}]}}"#);
    let vectors = r#"{"object":"list","model":"m","usage":{"prompt_tokens":1,"total_tokens":1},
        "data":[{"object":"embedding","index":0,"embedding":[1.0]}]}"#;
    let cut = Server::start(|asked| {
        let whole = server::json(200, &"x".repeat(50));
        match asked.path.as_str() {
            "/v1/models" => Reply::Close(whole[..whole.len() - 9].to_vec()),
            _ => Reply::Close(Vec::new()),
        }
    })
    .await;
    let good = Server::start(move |asked| match asked.path.as_str() {
        "/v1/models" => Reply::Close(server::json(200, &models)),
        _ => Reply::Close(server::json(200, vectors)),
    })
    .await;
    let client = client(&[&cut, &good]);
    assert_eq!(client.models().await.unwrap().data[0].id, "m");
    let input = grapevine::api::Input::Text("hi".to_owned());
    assert_eq!(client.embed("m", input).await.unwrap().data.len(), 1);
    assert!(cut.asked().len() == 1, "{:?}", cut.asked().len());
}
