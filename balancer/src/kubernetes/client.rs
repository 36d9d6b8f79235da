//! The client: where the API server is, with which credentials, and how long it may take.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail, ensure};
use futures_util::FutureExt as _;
use http::{HeaderValue, Request, header::USER_AGENT};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tower::BoxError;

use super::health::Health;

/// How long the server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may take to begin its answer.
const ANSWER: Duration = Duration::from_secs(20);
/// Seconds until the server ends a watch: so that one that died without a word is noticed.
const WATCH_SECONDS: u32 = 55;
/// How far the ends of watches are spread, in seconds.
const WATCH_SPREAD_SECONDS: u32 = 10;
/// A connection on which nothing was read for so long is dead. It is longer than any watch.
const READ: Duration = Duration::from_secs(75);
/// The least time between two watches, where the server or a proxy ends them at once.
const WATCH_PACE: Duration = Duration::from_secs(1);
/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// A client, and the address that it talks to.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    /// The URL of the API server, for messages.
    pub server: String,
}

/// Makes a client: from the file in `KUBECONFIG`, else as the pod's service account, else from
/// `~/.kube/config`. The server need not answer. It has to be called within a runtime.
///
/// # Errors
/// If there is none of the three, it can't be read, or it names a program to get credentials from:
/// the daemon may not run programs.
pub fn connection() -> Result<Connection> {
    over(find(from_kubeconfig)?)
}

/// As [`connection`], for a verb that somebody runs: it may run programs.
///
/// # Errors
/// If there is none of the three, or it can't be read.
pub fn connection_of_user() -> Result<Connection> {
    over(find(any_kubeconfig)?)
}

fn over(mut config: Config) -> Result<Connection> {
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(READ);
    config.reset_reader_on_write = true;
    // Its retries would hide for minutes that the server answers 503. Ours are counted.
    config.default_retry = false;
    let program = concat!("balancer/", env!("CARGO_PKG_VERSION"));
    let program = HeaderValue::from_static(program);
    config.headers.push((USER_AGENT, program));
    let server = config.cluster_url.to_string();
    let server = server.trim_end_matches('/').to_owned();
    let client = Client::try_from(config).with_context(|| {
        format!(
            "no client for the API server at {server} can be made: look at its certificates and \
             credentials"
        )
    })?;
    Ok(Connection { client, server })
}

fn find(from_kubeconfig: impl Fn(Kubeconfig) -> Result<Config>) -> Result<Config> {
    if let Some(files) = env::var_os("KUBECONFIG").filter(|files| !files.is_empty()) {
        return Kubeconfig::from_env()
            .map_err(Error::from)
            .and_then(|config| config.context("there is no such file"))
            .and_then(&from_kubeconfig)
            .with_context(|| {
                let files = files.display();
                format!("the kubeconfig {files} (KUBECONFIG) can't be used")
            });
    }
    if env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Config::incluster().context(
            "the pod's service account can't be used: it needs a mounted token \
             (automountServiceAccountToken)",
        );
    }
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".kube/config"));
    let Some(file) = home.filter(|file| file.exists()) else {
        bail!(
            "there is no API server to talk to: the balancer does not run in a pod \
             (KUBERNETES_SERVICE_HOST is not set), and neither KUBECONFIG nor ~/.kube/config is \
             there. Without Kubernetes write `services:` instead of `kubernetes:`"
        );
    };
    Kubeconfig::read_from(&file)
        .map_err(Error::from)
        .and_then(from_kubeconfig)
        .with_context(|| format!("the kubeconfig {} can't be used", file.display()))
}

fn any_kubeconfig(kubeconfig: Kubeconfig) -> Result<Config> {
    // It only reads files: the future is ready when it is first polled.
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .now_or_never()
        .context("reading it did not end")??;
    Ok(config)
}

fn from_kubeconfig(kubeconfig: Kubeconfig) -> Result<Config> {
    let config = any_kubeconfig(kubeconfig)?;
    ensure!(
        config.auth_info.exec.is_none() && config.auth_info.auth_provider.is_none(),
        "its user gets credentials from a program (exec or auth-provider), and the daemon may not \
         run programs: use a user with a token, a tokenFile or a client certificate"
    );
    Ok(config)
}

/// `client` with a bound on the time to the first answer, with pauses between watches, and with a
/// note in `health` of the time that answers tell, and when a watch has begun.
pub(crate) fn observed(client: &Client, health: &Arc<Health>) -> Client {
    let (inner, health) = (client.clone(), Arc::clone(health));
    let last = Arc::new(Mutex::new(None::<Instant>));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (inner, health, last) = (inner.clone(), Arc::clone(&health), Arc::clone(&last));
        async move {
            let watches = is_watch(&request);
            if watches {
                let mut last = last.lock().await;
                if let Some(last) = *last {
                    tokio::time::sleep_until(last + WATCH_PACE).await;
                }
                *last = Some(Instant::now());
            }
            let answer = tokio::time::timeout(ANSWER, inner.send(request)).await;
            let response =
                answer.map_err(|_| format!("no answer within {} s", ANSWER.as_secs()))??;
            health.clock.note(response.headers());
            if watches && response.status().is_success() {
                health.succeeded();
            }
            Ok::<_, BoxError>(response)
        }
    });
    Client::new(service, client.default_namespace())
}

fn is_watch(request: &Request<Body>) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| pair == "watch=true")
}

/// How long to wait after the nth failure in a row, the first being 0: doubling to
/// [`LONGEST_PAUSE`], and spread over half of it, so that daemons don't come back all at once.
pub(crate) fn pause(failures: u32) -> Duration {
    let full = Duration::from_millis(500 << failures.min(5)).min(LONGEST_PAUSE);
    full / 2 + full * jitter(1000) / 2000
}

/// After how many seconds the server is to end the next watch.
pub(crate) fn watch_seconds() -> u32 {
    WATCH_SECONDS + jitter(WATCH_SPREAD_SECONDS)
}

/// A number below `bound`, which need not be unpredictable.
pub(crate) fn jitter(bound: u32) -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    let random = RandomState::new().hash_one(bound) % u64::from(bound.max(1));
    u32::try_from(random).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        for failures in 0..100 {
            let pause = pause(failures);
            assert!(pause >= Duration::from_millis(250) && pause <= LONGEST_PAUSE);
        }
        assert!(pause(20) >= LONGEST_PAUSE / 2);
        let different = (0..50)
            .map(|_| pause(9))
            .collect::<std::collections::BTreeSet<_>>();
        assert!(different.len() > 10);
    }

    #[tokio::test]
    async fn a_kubeconfig_that_runs_programs_is_refused() {
        let yaml = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
                    clusters: [{name: k, cluster: {server: 'https://127.0.0.1:1'}}]\n\
                    users: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, interactiveMode: Never}}}]\n";
        let error = from_kubeconfig(Kubeconfig::from_yaml(yaml).unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("may not run programs"));
        let yaml = yaml.replace("exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, interactiveMode: Never}", "token: abc");
        assert!(from_kubeconfig(Kubeconfig::from_yaml(&yaml).unwrap()).is_ok());
    }
}
