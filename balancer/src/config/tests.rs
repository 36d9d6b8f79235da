use std::{fmt::Write as _, fs, io::Write as _, os::unix::fs::PermissionsExt as _};

use proptest::prelude::*;

use super::*;

mod kubernetes;
mod selector;

fn parsed(text: &str) -> Config {
    Config::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refused(text: &str) -> String {
    match Config::parse(text) {
        Err(error) => error.to_string(),
        Ok(config) => panic!("should be refused:\n{text}\n{config:?}"),
    }
}

/// Checks that `text` is refused because of this line, in these words and with advice.
fn is_refused(text: &str, line: usize, words: &str) {
    let message = refused(text);
    assert!(
        message.starts_with(&format!("line {line}, column ")),
        "not on line {line}: {message}\n{text}"
    );
    assert!(
        message.contains(words),
        "{message}\ndoes not say: {words}\n{text}"
    );
    assert!(message.contains("; "), "no advice: {message}");
}

/// A service that is right, then `more` from line 4.
fn with(more: &str) -> String {
    format!("services:\n  - name: agents\n    port: 11800\n{more}")
}

#[test]
fn the_smallest_file() {
    let config = parsed(&with(""));
    assert_eq!(
        config,
        Config {
            services: vec![Service {
                name: "agents".to_owned(),
                port: 11800,
                address: None,
                policy: Policy::LeastConnections,
                backends: None,
                quota: QuotaRule::Unlimited,
                exempt: Vec::new(),
            }],
            fail_open_after: Duration::from_secs(30),
            namespaces: NetnsScope::Own,
            kubernetes: None,
        }
    );
}

#[test]
fn the_largest_file() {
    let config = parsed(
        r#"
# every key there is
services:
  - name: agents
    port: 11800
    address: 10.0.0.9
    policy: source-hash
    backends: ["127.0.0.1:21801", {address: "[::1]:21802", weight: 2}, "::ffff:127.0.0.1:21803"]
    quota: {clients: 300, connections_per_client: 2, headroom: 15%, min_quota: 20}
    exempt: [10.0.0.0/24, 10.1.2.3, "fd00::/8", "::1", "::ffff:192.0.2.0/120", 10.0.0.0/24]
  - name: als
    port: 11802
    policy: round-robin
    quota:
      per_backend: 100
fail_open_after: 1500 ms
namespaces: [/run/netns/blue, /proc/1/ns/net]
"#
        .replace("\"::ffff:127.0.0.1:21803\"", "\"[::ffff:127.0.0.1]:21803\"")
        .as_str(),
    );
    let agents = &config.services[0];
    assert_eq!(agents.address, Some("10.0.0.9".parse().unwrap()));
    assert_eq!(agents.policy, Policy::SourceHash);
    let backends: Vec<_> = agents
        .backends
        .iter()
        .flatten()
        .map(|backend| (backend.address.to_string(), backend.weight))
        .collect();
    assert_eq!(
        backends,
        [
            ("127.0.0.1:21801".to_owned(), 1),
            ("[::1]:21802".to_owned(), 2),
            ("127.0.0.1:21803".to_owned(), 1)
        ]
    );
    assert_eq!(
        agents.quota,
        QuotaRule::Computed {
            clients: Some(300),
            connections_per_client: 2,
            headroom_percent: 15,
            min_quota: 20
        }
    );
    let exempt: Vec<String> = agents.exempt.iter().map(ToString::to_string).collect();
    assert_eq!(
        exempt,
        [
            "10.0.0.0/24",
            "10.1.2.3/32",
            "fd00::/8",
            "::1/128",
            "192.0.2.0/24"
        ]
    );
    assert_eq!(config.services[1].quota, QuotaRule::Fixed(100));
    assert_eq!(config.fail_open_after, Duration::from_millis(1500));
    assert_eq!(
        config.namespaces,
        NetnsScope::Paths(vec!["/run/netns/blue".into(), "/proc/1/ns/net".into()])
    );
}

#[test]
fn what_is_left_out_of_a_computed_quota_has_a_default() {
    let config = parsed(&with("    quota: {clients: 7}\n"));
    let expected = QuotaRule::Computed {
        clients: Some(7),
        connections_per_client: 1,
        headroom_percent: 0,
        min_quota: 16,
    };
    assert_eq!(config.services[0].quota, expected);
}

#[test]
fn rules_in_words() {
    let words = |quota: &str| parsed(&with(quota)).services[0].quota.to_string();
    assert_eq!(words(""), "none: steering only");
    assert_eq!(
        words("    quota: {per_backend: 100}\n"),
        "100 for each backend"
    );
    assert_eq!(
        words("    quota: {clients: 300, connections_per_client: 2, headroom: 15%}\n"),
        "300 clients × 2 + 15% shared by weight, at least 16 each"
    );
    assert_eq!(
        words("    quota: {headroom: 15%}\n"),
        "clients (not known) × 1 + 15% shared by weight, at least 16 each"
    );
    let longest = QuotaRule::Computed {
        clients: Some(u32::MAX),
        connections_per_client: u32::MAX,
        headroom_percent: u32::MAX,
        min_quota: u32::MAX,
    };
    assert!(longest.to_string().len() < 128);
}

#[test]
fn times_have_units_and_bounds() {
    for (text, seconds) in [
        ("1s", 1),
        ("30s", 30),
        ("2m", 120),
        ("1h", 3600),
        ("1000ms", 1),
        ("60m", 3600),
    ] {
        let config = parsed(&with(&format!("fail_open_after: {text}\n")));
        assert_eq!(
            config.fail_open_after,
            Duration::from_secs(seconds),
            "{text}"
        );
    }
}

#[test]
fn an_exact_address_may_share_a_port_with_any() {
    let config = parsed(&with(
        "  - {name: vip, port: 11800, address: 10.0.0.9}\n  - {name: other, port: 11800, address: \"::1\"}\n",
    ));
    assert_eq!(config.services.len(), 3);
}

#[test]
fn a_backend_may_use_the_port_at_another_address() {
    parsed(
        "services:\n  - {name: a, port: 11800, address: 10.0.0.9, backends: [\"10.0.0.1:11800\"]}\n",
    );
}

#[test]
fn an_alias_is_the_value_that_it_names() {
    let config = parsed(
        "services:\n  - {name: a, port: 1, exempt: &peers [10.0.0.0/24]}\n  - {name: b, port: 2, exempt: *peers}\n",
    );
    assert_eq!(config.services[0].exempt, config.services[1].exempt);
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_fine() {
    assert_eq!(parsed(&format!("\u{feff}{}", with(""))), parsed(&with("")));
    assert_eq!(parsed(&with("").replace('\n', "\r\n")), parsed(&with("")));
}

/// Text, line, what the message must say.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_mistake_has_its_line_and_its_words() {
    let two_backends = |item: &str| {
        with(&format!(
            "    backends:\n      - \"127.0.0.1:21801\"\n      - {item}\n"
        ))
    };
    let quota = |text: &str| with(&format!("    quota: {text}\n"));
    let second = |text: &str| with(&format!("  - {text}\n"));
    let cases = [
        // keys
        (with("    prot: 1\n"), 4, "unknown key `prot` in a service; did you mean `port`?"),
        (with("    Per-Backend: 1\n"), 4, "unknown key `Per-Backend` in a service; the keys are name, port"),
        (quota("{Per-Backend: 1}"), 4, "unknown key `Per-Backend` in `quota`; did you mean `per_backend`?"),
        (with("timeout: 3s\n"), 4, "unknown key `timeout` in the file; the keys are services"),
        (two_backends("{address: \"127.0.0.1:21802\", wieght: 2}"), 6, "did you mean `weight`?"),
        (with("    port: 11801\n"), 4, "`port` is given twice, first on line 3; keep one"),
        (with("services: []\n"), 4, "`services` is given twice, first on line 1"),
        (quota("\n      clients: 3\n      clients: 3"), 6, "`clients` is given twice, first on line 5"),
        (with("    <<: {}\n"), 4, "merge keys are not supported"),
        (with("    ? [a]\n    : 3\n"), 4, "a key is a word, this one is a list"),
        ("services:\n  - port: 3\n".to_owned(), 2, "`name` is missing in a service; add `name: …`"),
        ("services:\n  - name: a\n".to_owned(), 2, "`port` is missing in a service"),
        ("fail_open_after: 30s\n".to_owned(), 1, "`services` is missing in the file"),
        // kinds of values
        ("services: []\n".to_owned(), 1, "`services` is empty"),
        ("services:\nfail_open_after: 30s\n".to_owned(), 1, "`services` has no value"),
        ("services: {name: a}\n".to_owned(), 1, "`services` must be a list, this is a mapping"),
        ("services: [a]\n".to_owned(), 1, "a service must be `key: value` settings, this is a single value"),
        ("- a\n".to_owned(), 1, "the file must be `key: value` settings, this is a list"),
        (second("{name: b, port: [1]}"), 4, "a port must be a single value, this is a list"),
        (second("{name: b, port: }"), 4, "a port is missing here"),
        // names
        (second("{name: agents, port: 2}"), 4, "a second service is named `agents`, the first on line 2"),
        (second("{name: \"\", port: 2}"), 4, "the name is empty"),
        (second("{name: OAP, port: 2}"), 4, "the name `OAP` has `O` in it; use up to 63 of a-z, 0-9 and -"),
        (second("{name: \"a\\tb\", port: 2}"), 4, "the name `a\\tb` has `\\t` in it"),
        (second("{name: -a, port: 2}"), 4, "the name `-a` starts or ends with a -"),
        (second(&format!("{{name: {}, port: 2}}", "a".repeat(64))), 4, "is 64 bytes long"),
        // ports
        (second("{name: b, port: 0}"), 4, "`0` is not a TCP port; write a number from 1 to 65535"),
        (second("{name: b, port: 70000}"), 4, "`70000` is not a TCP port"),
        (second("{name: b, port: -1}"), 4, "`-1` is not a TCP port"),
        (second("{name: b, port: 0x10}"), 4, "`0x10` is not a TCP port"),
        (second("{name: b, port: http}"), 4, "`http` is not a TCP port"),
        (second("{name: b, port: 11800}"), 4, "`b` is on the same port and address as `agents` on line 3: port 11800 on any address"),
        (
            "services:\n- {name: a, port: 1, address: 10.0.0.9}\n- {name: b, port: 1, address: \"::ffff:10.0.0.9\"}\n".to_owned(),
            3,
            "`b` is on the same port and address as `a` on line 2: 10.0.0.9:1",
        ),
        // addresses
        (with("    address: 0.0.0.0\n"), 4, "`0.0.0.0` is no address of its own; leave `address` out"),
        (with("    address: 224.0.0.1\n"), 4, "can't be connected to over TCP"),
        (with("    address: oap.example\n"), 4, "`oap.example` is not an IP address"),
        (with("    address: 10.0.0.9:80\n"), 4, "`10.0.0.9:80` is not an IP address"),
        (with("    policy: random\n"), 4, "`random` is not a policy; write one of least-connections, round-robin, source-hash"),
        // backends
        (with("    backends: []\n"), 4, "`backends` is an empty list"),
        (with("    backends:\n"), 4, "`backends` has no value"),
        (with("    backends: 127.0.0.1:21801\n"), 4, "`backends` must be a list"),
        (two_backends("\"127.0.0.1:0\""), 6, "the backend `127.0.0.1:0` has port 0"),
        (two_backends("\"127.0.0.1:70000\""), 6, "the backend `127.0.0.1:70000` is not an address with a port"),
        (two_backends("\"127.0.0.1\""), 6, "the backend `127.0.0.1` has no port"),
        (two_backends("\"::1\""), 6, "write [ADDRESS]:PORT"),
        (two_backends("oap-0:11800"), 6, "the backend `oap-0:11800` is not an address with a port"),
        (two_backends("0.0.0.0:21801"), 6, "is no address of its own"),
        (two_backends("\"[::]:21801\""), 6, "is no address of its own"),
        (two_backends("224.0.0.1:21801"), 6, "can't be listened on over TCP"),
        (two_backends("\"[ff02::1]:21801\""), 6, "can't be listened on over TCP"),
        (two_backends("255.255.255.255:21801"), 6, "can't be listened on over TCP"),
        (two_backends("\"[fe80::1%3]:21801\""), 6, "has a scope"),
        (two_backends("[\"::1\"]"), 6, "a backend is an address, this is a list"),
        (two_backends("127.0.0.1:21801"), 6, "the backend 127.0.0.1:21801 is listed twice, first on line 5"),
        (two_backends("127.0.0.1:11800"), 6, "the backend 127.0.0.1:11800 is where clients of `agents` connect to (port 11800 on any address)"),
        (
            "services:\n- name: a\n  port: 1\n  address: 10.0.0.9\n  backends: [\"10.0.0.9:1\"]\n".to_owned(),
            5,
            "the backend 10.0.0.9:1 is where clients of `a` connect to (10.0.0.9:1)",
        ),
        (
            "services:\n- {name: a, port: 1, backends: [\"10.0.0.1:3\"]}\n- {name: b, port: 2, backends: [\"10.0.0.1:1\"]}\n".to_owned(),
            3,
            "the backend 10.0.0.1:1 is where clients of `a` connect to",
        ),
        (
            "services:\n- {name: a, port: 1, backends: [\"10.0.0.1:3\"]}\n- {name: b, port: 2, backends: [\"10.0.0.1:3\"]}\n".to_owned(),
            3,
            "the backend 10.0.0.1:3 is already one of `a`, on line 2",
        ),
        (two_backends("{address: \"127.0.0.1:21802\", weight: 0}"), 6, "weight `0` is not possible; write a whole number from 1 to 1000"),
        (two_backends("{address: \"127.0.0.1:21802\", weight: 1001}"), 6, "weight `1001` is not possible"),
        (two_backends("{address: \"127.0.0.1:21802\", weight: 1.5}"), 6, "weight `1.5` is not possible"),
        (two_backends("{weight: 1}"), 6, "`address` is missing in a backend"),
        // quotas
        (quota("{per_backend: 0}"), 4, "per_backend `0` is not possible; write a whole number from 1 to 100000000; to close a backend use `balancer quota set`"),
        (quota("{per_backend: -3}"), 4, "per_backend `-3` is not possible"),
        (quota("{per_backend: 9999999999999999999999}"), 4, "is not possible"),
        (quota("{per_backend: 5, clients: 3}"), 4, "`clients` beside `per_backend`"),
        (quota("\n      headroom: 5%\n      per_backend: 5"), 5, "`headroom` beside `per_backend`"),
        (quota("{}"), 4, "`quota` has no settings"),
        (quota("100"), 4, "`quota` must be `key: value` settings, this is a single value"),
        (with("    quota:\n"), 4, "`quota` must be `key: value` settings, this is empty"),
        (quota("{clients: 0}"), 4, "clients `0` is not possible"),
        (quota("{clients: 3, connections_per_client: 0}"), 4, "connections_per_client `0` is not possible"),
        (quota("{clients: 3, min_quota: 0}"), 4, "min_quota `0` is not possible"),
        (quota("{clients: 3, headroom: -5}"), 4, "headroom `-5` is not a percentage; write a whole number of percent from 0% to 1000%"),
        (quota("{clients: 3, headroom: -5%}"), 4, "headroom `-5%` is not a percentage"),
        (quota("{clients: 3, headroom: lots}"), 4, "headroom `lots` is not a percentage"),
        (quota("{clients: 3, headroom: 15}"), 4, "headroom `15` is not a percentage; write `15%` if percent is meant"),
        (quota("{clients: 3, headroom: 0.15}"), 4, "headroom `0.15` is not a percentage"),
        (quota("{clients: 3, headroom: 1001%}"), 4, "headroom `1001%` is not a percentage"),
        // exempt
        (with("    exempt: 10.0.0.0/24\n"), 4, "`exempt` must be a list"),
        (with("    exempt:\n      - 10.0.0.0/24\n      - everyone\n"), 6, "`everyone` is not a network"),
        (with("    exempt: [10.0.0.0/33]\n"), 4, "`10.0.0.0/33` is not a network"),
        (with("    exempt: [10.0.0.5/24]\n"), 4, "write 10.0.0.0/24 for the network or 10.0.0.5 for the single address"),
        // the file's own settings
        (with("fail_open_after: 0\n"), 4, "fail_open_after `0` is not a time"),
        (with("fail_open_after: 0s\n"), 4, "fail_open_after `0s` is out of bounds"),
        (with("fail_open_after: 5ms\n"), 4, "fail_open_after `5ms` is out of bounds; write a time from 1s"),
        (with("fail_open_after: 10d\n"), 4, "fail_open_after `10d` is not a time"),
        (with("fail_open_after: 240h\n"), 4, "fail_open_after `240h` is out of bounds"),
        (with("fail_open_after: 99999999999999999999h\n"), 4, "is not a time"),
        (with("fail_open_after: 18446744073709551615h\n"), 4, "is not a time"),
        (with("fail_open_after: s\n"), 4, "fail_open_after `s` is not a time"),
        (with("fail_open_after: 30\n"), 4, "fail_open_after `30` is not a time; write a whole number with a unit"),
        (with("namespaces: []\n"), 4, "`namespaces` is an empty list"),
        (with("namespaces: both\n"), 4, "namespaces `both` is not understood; write own, all, or"),
        (with("namespaces: [blue]\n"), 4, "the namespace `blue` is not an absolute path"),
        (with("namespaces:\n- /run/netns/a\n- /run/netns/a\n"), 6, "the namespace `/run/netns/a` is listed twice"),
        (with("namespaces:\n"), 4, "`namespaces` is empty"),
        // YAML
        (with("   exempt: [\n"), 4, "this is not valid YAML"),
        (with("    exempt: [\"10.0.0.0/24]\n"), 4, "this is not valid YAML"),
        (with("\texempt: []\n"), 3, "this is not valid YAML"),
        (with("---\nservices: []\n"), 4, "a second YAML document starts here"),
        (with("    policy: !fast least-connections\n"), 4, "the YAML tag !fast is not understood"),
        (with("    exempt: &a [*a]\n"), 4, "this alias stands inside the value that it names"),
        (with("    exempt: *nobody\n"), 4, "this is not valid YAML"),
        (with(&format!("    exempt: {}{}\n", "[".repeat(40), "]".repeat(40))), 4, "nested more than 16 deep"),
        (format!("%YAML 1.2\n---\n{}", with("")), 1, "this is not valid YAML"),
    ];
    for (text, line, words) in cases {
        is_refused(&text, line, words);
    }
}

#[test]
fn a_file_without_settings() {
    for text in ["", "\n", "# nothing\n", "---\n...\n"] {
        let message = refused(text);
        assert!(message.contains("settings"), "{message}");
    }
}

#[test]
fn too_many_of_anything() {
    let mut services = "services:\n".to_owned();
    for index in 0..=MAX_SERVICES {
        writeln!(services, "  - {{name: s{index}, port: {}}}", index + 1).unwrap();
    }
    assert_eq!(
        refused(&services),
        "line 66, column 5: 65 services, at most 64 are possible; remove some, or run several daemons with a --state-dir each"
    );

    let mut backends = with("    backends:\n");
    for index in 0..=MAX_SERVICE_BACKENDS {
        writeln!(backends, "      - 127.0.0.1:{}", 20_000 + index).unwrap();
    }
    assert_eq!(
        refused(&backends),
        "line 261, column 9: 257 backends, a service can have at most 256; remove some, or split the service"
    );

    let mut all = "services:\n".to_owned();
    for service in 0..5 {
        write!(
            all,
            "  - name: s{service}\n    port: {}\n    backends:\n",
            service + 1
        )
        .unwrap();
        for index in 0..205 {
            writeln!(all, "      - 127.0.0.1:{}", 20_000 + 205 * service + index).unwrap();
        }
    }
    assert!(
        refused(&all).starts_with("line 1041, column 9: more than 1024 backends in all; "),
        "{}",
        refused(&all)
    );

    let networks = vec!["10.0.0.1"; MAX_EXEMPT + 1].join(",");
    let message = refused(&with(&format!("    exempt: [{networks}]\n")));
    assert!(
        message.starts_with("line 4, column 2318: 257 exempt networks"),
        "{message}"
    );
}

#[test]
fn a_bomb_of_aliases_is_one_short_error() {
    let mut text = "services: []\na0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..64 {
        let inner = vec![format!("*a{}", level - 1); 9].join(", ");
        writeln!(text, "a{level}: &a{level} [{inner}]").unwrap();
    }
    assert!(
        refused(&text).starts_with("line 2, column 1: unknown key `a0`"),
        "{}",
        refused(&text)
    );

    let text = "services: &s\n  - {name: a, port: 1, exempt: &e [10.0.0.1, *e]}\n";
    assert!(
        refused(text).contains("inside the value"),
        "{}",
        refused(text)
    );
}

#[test]
fn a_message_shows_only_the_start_of_what_it_quotes_and_no_control_characters() {
    let message = refused(&with(&format!(
        "    policy: \"\\e[31m{}\"\n",
        "x".repeat(10_000)
    )));
    assert!(message.len() < 300, "{message}");
    assert!(!message.contains('\u{1b}'));
}

/// The parser places what is absent at the end of the text on the line behind it.
#[test]
fn no_error_is_on_a_line_behind_the_last() {
    for (text, line) in [
        ("?\n", 1),
        ("? # a comment\n\n", 2),
        ("services:\r\n- ?\r\n", 2),
        ("services:\r- ?\r", 2),
        ("services: [\n", 1),
        ("services:\n- \"a\n", 2),
        ("? ", 1),
    ] {
        let error = Config::parse(text).expect_err("should be refused");
        assert!(
            error.line().is_some_and(|found| found <= line),
            "{text:?}: {error}"
        );
    }
}

#[test]
fn a_tag_is_shown_as_any_other_word() {
    let message = refused(&format!("services: !{} 1\n", "a".repeat(5000)));
    assert!(message.len() < 200, "{message}");
    assert!(message.contains("the YAML tag !aaa"), "{message}");
}

mod files {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load(path: &Path) -> String {
        Config::load(path)
            .expect_err("should be refused")
            .to_string()
    }

    #[test]
    fn a_good_one_and_its_errors_by_line() {
        assert_eq!(
            Config::load(file(with("").as_bytes()).path()),
            Ok(parsed(&with("")))
        );
        let bad = file(with("    prot: 1\n").as_bytes());
        let message = load(bad.path());
        let start = format!("{}:4:5: unknown key `prot`", bad.path().display());
        assert!(message.starts_with(&start), "{message}");
    }

    #[test]
    fn none_there_or_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert_eq!(
            load(path),
            format!(
                "{}: this is a directory, not a file; give the path of a file in it with --config",
                path.display()
            )
        );
        let missing = path.join("none.yaml");
        assert_eq!(
            load(&missing),
            format!(
                "{}: no such file; give the path of a configuration file with --config",
                missing.display()
            )
        );
        let below = file(b"").path().join("x");
        assert!(load(&below).contains("can't be read") || load(&below).contains("no such file"));
    }

    #[test]
    fn not_readable() {
        let file = file(b"");
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(0o000))
            .unwrap();
        // Root may read it all the same, and then finds it empty.
        let message = load(file.path());
        let expected = if nix::unistd::geteuid().is_root() {
            "no settings"
        } else {
            "not allowed to read it"
        };
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn too_large_or_without_an_end() {
        let large = file(&vec![b' '; 10 << 20]);
        assert!(load(large.path()).ends_with(": larger than 1048576 bytes (1 MiB), the most a configuration may have; check that this is the right file"));
        assert!(load(Path::new("/dev/zero")).contains("larger than 1048576 bytes"));
        let fits = file(&vec![b' '; 1 << 20]);
        assert!(load(fits.path()).contains("no settings"));
    }

    #[test]
    fn not_text() {
        let bad = file(b"services:\n  - name: \xff\n");
        assert_eq!(
            load(bad.path()),
            format!(
                "{}:2:11: this is not UTF-8 text; save the file as UTF-8",
                bad.path().display()
            )
        );
        assert!(load(file(b"\x7fELF\x02\x01\x01\0\0\0").path()).contains(":1:"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,80}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn no_yaml_makes_it_panic(text in "[-a-z0-9:,\\[\\]{}\"'&*!|>%#?~<.\n\t ]{0,120}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn no_damage_to_a_good_file_makes_it_panic(at in 0..400usize, with in "[-a-z0-9:,\\[\\]{}\"'&*!|>\n ]{0,3}", cut in 0..5usize) {
        let good = "services:\n  - name: agents\n    port: 11800\n    address: 10.0.0.9\n    policy: source-hash\n    \
            backends: [\"127.0.0.1:21801\", {address: \"[::1]:21802\", weight: 2}]\n    \
            quota: {clients: 300, connections_per_client: 2, headroom: 15%}\n    exempt: [10.0.0.0/24, \"::1\"]\n\
            fail_open_after: 30s\nnamespaces: own\n";
        parsed(good);
        let at = at.min(good.len());
        let end = (at + cut).min(good.len());
        let damaged = format!("{}{with}{}", &good[..at], &good[end..]);
        if let Err(error) = Config::parse(&damaged) {
            let message = error.to_string();
            prop_assert!(message.contains("; "), "{}", message);
            prop_assert!(error.line().is_some() || message.contains("no settings"), "{}", message);
        }
    }

    #[test]
    fn numbers_are_what_they_look_like(port: u16, weight in 0..2000u32, quota: u32, headroom in 0..2000u32) {
        let text = format!(
            "services:\n- {{name: a, port: {port}, backends: [{{address: \"10.0.0.1:1\", weight: {weight}}}], quota: {{clients: {quota}, headroom: {headroom}%}}}}\n"
        );
        let possible = port > 1 && (1..=MAX_WEIGHT).contains(&weight) && (1..=MAX_CONNECTIONS).contains(&quota) && headroom <= MAX_HEADROOM_PERCENT;
        match Config::parse(&text) {
            Ok(config) => {
                prop_assert!(possible);
                let service = &config.services[0];
                prop_assert_eq!(service.port, port);
                prop_assert_eq!(service.backends.as_ref().unwrap()[0].weight, weight);
                let is_so = matches!(service.quota, QuotaRule::Computed { clients: Some(c), headroom_percent: h, .. } if c == quota && h == headroom);
                prop_assert!(is_so);
            }
            Err(error) => prop_assert!(!possible, "{}", error),
        }
    }
}
