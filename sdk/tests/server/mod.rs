//! A TCP server that speaks just enough HTTP to say anything.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    head: String,
    pub body: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }
}

/// What is done with a request.
pub enum Reply {
    /// These bytes, then the connection closes.
    Close(Vec<u8>),
    /// These bytes, then nothing, until the client closes.
    Hold(Vec<u8>),
}

/// Dropping it ends it.
pub struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    /// Connections held, and those of them that the client closed.
    held: Arc<(AtomicUsize, AtomicUsize)>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let held = Arc::<(AtomicUsize, AtomicUsize)>::default();
        let (seen, holds, script) = (asked.clone(), held.clone(), Arc::new(script));
        let task = tokio::spawn(async move {
            // Dropped with the task, and its connections with it.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, holds, script) = (seen.clone(), holds.clone(), script.clone());
                connections.spawn(async move { serve(stream, &seen, &holds, &*script).await });
            }
        });
        Server { url, asked, held, task }
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// What it was asked, without questions for its health.
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| asked.path != "/healthz").cloned().collect()
    }

    /// Whether the client closes, soon, all connections that were held.
    pub async fn closed(&self) -> bool {
        for _ in 0..500 {
            let (held, closed) = (&self.held.0, &self.held.1);
            if held.load(Ordering::SeqCst) > 0
                && held.load(Ordering::SeqCst) == closed.load(Ordering::SeqCst)
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: &Mutex<Vec<Asked>>,
    held: &(AtomicUsize, AtomicUsize),
    script: &(dyn Fn(&Asked) -> Reply + Send + Sync),
) {
    let mut bytes = Vec::new();
    let asked = loop {
        match stream.read_buf(&mut bytes).await {
            Ok(n) if n > 0 => {}
            _ => return,
        }
        if let Some(asked) = parse(&bytes) {
            break asked;
        }
    };
    let reply = script(&asked);
    seen.lock().unwrap().push(asked);
    match reply {
        Reply::Close(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Hold(bytes) => {
            held.0.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(&bytes).await;
            let _ = stream.read_buf(&mut Vec::new()).await;
            held.1.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Asked> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let path = head.split(' ').nth(1)?.to_owned();
    let asked = Asked { path, head: head.to_owned(), body: body.to_owned() };
    let length = asked.header("content-length").map_or(0, |n| n.parse().unwrap());
    (body.len() == length).then_some(asked)
}

pub fn json(status: u16, body: &str) -> Vec<u8> {
    json_with(status, "", body)
}

pub fn json_with(status: u16, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         {headers}connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n";

/// An answer that ends with its connection.
pub fn stream(events: &str) -> Vec<u8> {
    stream_of(events.as_bytes())
}

pub fn stream_of(events: &[u8]) -> Vec<u8> {
    [STREAM.as_bytes(), b"connection: close\r\n\r\n", events].concat()
}

/// An answer in pieces of so many bytes.
pub fn chunked(events: &str, size: usize) -> Vec<u8> {
    let mut all = format!("{STREAM}transfer-encoding: chunked\r\n\r\n").into_bytes();
    for piece in events.as_bytes().chunks(size) {
        all.extend(format!("{:x}\r\n", piece.len()).bytes());
        all.extend(piece);
        all.extend(b"\r\n");
    }
    all.extend(b"0\r\n\r\n");
    all
}
