//! The binary `formtune`.

fn main() -> std::process::ExitCode {
    formtune_agent::cli::main()
}
