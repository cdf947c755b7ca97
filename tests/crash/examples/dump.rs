fn main() {
    pcow_crash::coverage::dump()
}
